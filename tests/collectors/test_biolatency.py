# SPDX-License-Identifier: Apache-2.0
"""From rows of the maps to families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from collectors.biolatency import COLLECTOR, DURATION, ERRORS, OPERATIONS, QUEUE, SIZE, decode, error_name
from daemon.declare import Context, Row
from daemon.histogram import BYTES, SECONDS, Scale
from daemon.model import Distribution, Exemplar, Family

CONTEXT = Context(
    options={"max_devices": 64, "max_inflight": 16384}, max_series=1000, created=1_700_000_000.0,
    cgroup_path=lambda identifier: {7: "/system.slice/db.service"}.get(identifier, ""),
    wall_clock=lambda boot_ns: 1_700_000_100.0 + boot_ns / 1e9,
)  # fmt: skip

MS = 1_000_000
COMM = [int.from_bytes(b"postgres", "little"), 0]


def disk(name: bytes) -> bytes:
    return name.ljust(32, b"\0")


def raw(scale: Scale, *values: int) -> dict[str, Any]:
    slots = [0] * (scale.slots + 1)
    for value in values:
        slots[scale.slot(value)] += 1
    return {"slots": slots[:-1], "overflow": slots[-1], "sum": sum(values)}


def io(device_ns: int, queue_ns: int, size: int) -> dict[str, Any]:
    """struct block_io with one request in it."""
    return {"device": raw(SECONDS, device_ns), "queue": raw(SECONDS, queue_ns), "size": raw(BYTES, size)}


NOTHING = {"device": raw(SECONDS), "queue": raw(SECONDS), "size": raw(BYTES)}


def tables(
    *rows: Row, others: Mapping[int, Any] | None = None, errors: Mapping[tuple[bytes, int, int], int] | None = None
) -> dict[str, list[Row]]:
    """As the reader gives them: the array `block_io_other` always has a row for each operation."""
    return {
        "block_io": list(rows),
        "block_io_other": [
            Row(operation, (others or {}).get(operation, NOTHING)) for operation in range(len(OPERATIONS))
        ],
        "block_io_errors": [
            Row({"disk": disk(name), "operation": operation, "error": error}, count)
            for (name, operation, error), count in (errors or {}).items()
        ],
    }


def row(name: bytes, operation: int, value: Any) -> Row:
    return Row({"disk": disk(name), "operation": operation}, value)


def found(given: dict[str, list[Row]], context: Context = CONTEXT) -> dict[str, dict[tuple[str, ...], Any]]:
    """Metric name to labels to value."""
    families: list[Family] = list(decode(given, context).families)
    assert [family.metric for family in families] == list(COLLECTOR.metrics({}))
    for family in families:
        assert all(series.created == context.created for series in family.series)
        assert len({series.labels for series in family.series}) == len(family.series)
    return {family.metric.name: {series.labels: series.value for series in family.series} for family in families}


def test_values_are_in_base_units() -> None:
    one = found(tables(row(b"sda", 0, io(8 * MS, 2 * MS, 4096))))
    duration, queue, size = (one[metric.name]["sda", "read"] for metric in (DURATION, QUEUE, SIZE))
    assert (duration.count, duration.sum) == (1, 0.008)
    assert (queue.count, queue.sum) == (1, 0.002)
    assert (size.count, size.sum) == (1, 4096.0)
    assert dict(zip(SIZE.bounds, size.cumulative, strict=True))[2048.0] == 0
    assert dict(zip(SIZE.bounds, size.cumulative, strict=True))[4096.0] == 1
    assert dict(zip(DURATION.bounds, duration.cumulative, strict=True))[2**-7] == 0  # 7.8 ms
    assert dict(zip(DURATION.bounds, duration.cumulative, strict=True))[2**-6] == 1


def test_every_operation_has_its_label() -> None:
    rows = [row(b"nvme0n1", operation, io(MS, MS, 512)) for operation in range(5)]
    labels = set(found(tables(*rows))[DURATION.name])
    assert labels == {("nvme0n1", operation) for operation in ("read", "write", "flush", "discard", "other")}


def test_without_rows_there_is_no_series() -> None:
    assert found(tables()) == {DURATION.name: {}, QUEUE.name: {}, SIZE.name: {}, ERRORS.name: {}}


def test_what_found_no_place_is_other() -> None:
    one = found(tables(row(b"sda", 0, io(MS, MS, 512)), others={1: io(3 * MS, MS, 1024)}))
    assert set(one[SIZE.name]) == {("sda", "read"), ("other", "write")}
    assert one[SIZE.name]["other", "write"].sum == 1024


def test_what_found_no_place_shows_also_when_it_took_no_time_or_too_long() -> None:
    assert ("other", "read") in found(tables(others={0: io(0, 0, 0)}))[DURATION.name]
    assert ("other", "flush") in found(tables(others={2: io(100_000 * MS, 0, 0)}))[DURATION.name]


def test_disks_of_one_name_add_up() -> None:
    """A disk that is named `other`, and two whose names are not UTF-8: a page must not hold a series twice."""
    one = found(
        tables(
            row(b"other", 0, io(MS, MS, 512)), row(b"\xff", 0, io(MS, MS, 10)), row(b"\xfe", 0, io(MS, MS, 20)),
            others={0: io(2 * MS, MS, 1024)}, errors={(b"\xff", 0, 10): 2, (b"\xfe", 0, 10): 3},
        )
    )  # fmt: skip
    assert (one[SIZE.name]["other", "read"].count, one[SIZE.name]["other", "read"].sum) == (2, 1536)
    assert one[DURATION.name]["other", "read"].sum == pytest.approx(0.003)
    assert one[SIZE.name]["\N{REPLACEMENT CHARACTER}", "read"].sum == 30
    assert one[ERRORS.name] == {("\N{REPLACEMENT CHARACTER}", "read", "ioerr"): 5}


def test_series_beyond_the_limit_go_into_one_and_are_told() -> None:
    rows = [row(f"sd{letter}".encode(), 0, io(MS, MS, 512)) for letter in "abcd"]
    errors = {(f"sd{letter}".encode(), 0, 10): 1 for letter in "abc"}
    decoded = decode(tables(*rows, errors=errors), replace(CONTEXT, max_series=2))
    assert decoded.dropped == 2 + 1
    values = {series.labels: series.value for series in decoded.families[2].series}
    assert set(values) == {("sda", "read"), ("sdb", "read"), ("other", "other")}
    assert isinstance(values["other", "other"], Distribution)
    assert values["other", "other"].count == 2
    assert {series.labels: series.value for series in decoded.families[3].series} == {
        ("sda", "read", "ioerr"): 1, ("sdb", "read", "ioerr"): 1, ("other", "other", "other"): 1,
    }  # fmt: skip


def test_a_disk_whose_queue_time_is_not_known_has_none() -> None:
    one = found(tables(row(b"sda", 0, {**io(MS, MS, 512), "queue": raw(SECONDS)})))
    assert one[DURATION.name]["sda", "read"].count == 1
    assert one[QUEUE.name]["sda", "read"] == SECONDS.empty


def test_errors_have_names() -> None:
    one = found(tables(errors={(b"sda", 1, 10): 3, (b"sda", 1, 3): 1, (b"sdb", 0, -5): 2, (b"other", 0, 16): 4}))
    assert one[ERRORS.name] == {
        ("sda", "write", "ioerr"): 3, ("sda", "write", "nospc"): 1, ("sdb", "read", "ioerr"): 2,
        ("other", "read", "status_16"): 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (1, "notsupp"), (10, "ioerr"), (13, "dev_resource"),
        (14, "status_14"), (17, "status_17"), (255, "status_255"),  # not the same on all kernels, or unknown
        (-5, "ioerr"), (-28, "nospc"), (-22, "einval"), (-4095, "-4095"),
    ],
)  # fmt: skip
def test_error_names(error: int, name: str) -> None:
    assert error_name(error) == name


def exemplar(value: int, **more: Any) -> dict[str, Any]:
    """struct exemplar."""
    base = {
        "stamp_ns": 1,
        "time_ns": 5_000_000_000,
        "value": value,
        "pid": 42,
        "comm": COMM,
        "cgroup": 0,
        "words": [2048],
    }
    return base | more


def places(count: int, octave: int, one: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    return [one if place == octave else None for place in range(count)]


def test_exemplars_tell_pid_comm_sector_and_the_cgroup_that_caused_it() -> None:
    octave = SECONDS.octave(8 * MS)
    value = io(8 * MS, MS, 4096) | {
        "device_exemplars": places(27, octave, exemplar(8 * MS, cgroup=7)),
        "queue_exemplars": places(27, octave, None),
        "size_exemplars": places(32, BYTES.octave(4096), exemplar(4096, cgroup=8)),
    }
    one = found(tables(row(b"sda", 0, value)))
    who = (("pid", "42"), ("comm", "postgres"), ("sector", "2048"))
    assert one[DURATION.name]["sda", "read"].exemplars == {
        octave: Exemplar((*who, ("cgroup", "/system.slice/db.service")), 0.008, 1_700_000_105.0)
    }
    assert one[QUEUE.name]["sda", "read"].exemplars == {}
    assert one[SIZE.name]["sda", "read"].exemplars == {12: Exemplar(who, 4096.0, 1_700_000_105.0)}


def test_an_exemplar_without_a_task_has_only_its_sector() -> None:
    value = io(8 * MS, MS, 4096) | {"size_exemplars": places(32, 12, exemplar(4096, pid=0))}
    (one,) = found(tables(row(b"sda", 0, value)))[SIZE.name]["sda", "read"].exemplars.values()
    assert one.labels == (("sector", "2048"),)


def test_without_exemplars_there_are_none() -> None:
    assert found(tables(row(b"sda", 0, io(MS, MS, 512))))[DURATION.name]["sda", "read"].exemplars == {}


def test_options_size_the_maps() -> None:
    assert COLLECTOR.defines({"max_devices": 3, "max_inflight": 256}) == {"MAX_DEVICES": 3, "MAX_INFLIGHT": 256}
