# SPDX-License-Identifier: Apache-2.0
"""From rows of the maps to families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from collectors.runqlat import COLLECTOR, MAX_TASKS, decode
from daemon.declare import Context, Decoded, Row
from daemon.histogram import SECONDS
from daemon.model import Exemplar

PATHS = {1: "/", 7: "/system.slice/db.service", 8: "/system.slice/web.service"}
NONE = Context(
    options={"by": "none"}, max_series=1000, created=1_700_000_000.0,
    cgroup_path=lambda identifier: PATHS.get(identifier, ""),
    wall_clock=lambda boot_ns: 1_700_000_100.0 + boot_ns / 1e9,
)  # fmt: skip
CGROUP = replace(NONE, options={"by": "cgroup"})

MS = 1_000_000


def waits(*values: int, exemplars: Sequence[Any] | None = None) -> dict[str, Any]:
    """struct run_queue."""
    slots = [0] * (SECONDS.slots + 1)
    for value in values:
        slots[SECONDS.slot(value)] += 1
    queue: dict[str, Any] = {"wait": {"slots": slots[:-1], "overflow": slots[-1], "sum": sum(values)}}
    return queue | ({"wait_exemplars": exemplars} if exemplars is not None else {})


def values(decoded: Decoded) -> dict[tuple[str, ...], Any]:
    (family,) = decoded.families
    assert all(series.created == 1_700_000_000.0 for series in family.series)
    assert len({series.labels for series in family.series}) == len(family.series)
    return {series.labels: series.value for series in family.series}


def test_one_histogram_in_seconds() -> None:
    decoded = decode({"run_queue_all": [Row(0, waits(3 * MS, 40_000 * MS))], "run_queue": []}, NONE)
    assert decoded.families[0].metric.labels == ()
    found = values(decoded)[()]
    assert (found.count, found.sum) == (2, 40.003)
    assert found.cumulative[-1] == 1  # 40 s is above every bound
    assert dict(zip(SECONDS.bounds, found.cumulative, strict=True))[2**-9] == 0
    assert dict(zip(SECONDS.bounds, found.cumulative, strict=True))[2**-8] == 1


def test_it_is_there_at_zero_from_the_start() -> None:
    assert values(decode({"run_queue_all": [Row(0, waits())], "run_queue": []}, NONE)) == {(): SECONDS.empty}
    assert values(decode({"run_queue_all": [Row(0, waits())], "run_queue": []}, CGROUP)) == {("other",): SECONDS.empty}


def test_cgroups_have_paths_and_those_that_are_gone_are_other() -> None:
    groups = [Row(1, waits(MS)), Row(7, waits(MS, MS)), Row(98, waits(MS)), Row(99, waits(MS, MS, MS))]
    decoded = decode({"run_queue_all": [Row(0, waits(MS))], "run_queue": groups}, CGROUP)
    assert decoded.families[0].metric.labels == ("cgroup",)
    assert decoded.dropped == 0
    counts = {labels: value.count for labels, value in values(decoded).items()}
    assert counts == {("/",): 1, ("/system.slice/db.service",): 2, ("other",): 1 + 3 + 1}


def test_groups_of_one_path_add_up() -> None:
    context = replace(CGROUP, cgroup_path=lambda _: "/same")
    tables = {"run_queue_all": [Row(0, waits())], "run_queue": [Row(7, waits(MS)), Row(8, waits(2 * MS))]}
    found = values(decode(tables, context))["/same",]
    assert (found.count, found.sum) == (2, 0.003)


def test_series_beyond_the_limit_go_into_other_and_are_told() -> None:
    tables = {
        "run_queue_all": [Row(0, waits(MS))],
        "run_queue": [Row(7, waits(MS)), Row(8, waits(MS)), Row(1, waits(MS))],
    }
    decoded = decode(tables, replace(CGROUP, max_series=2))
    counts = {labels: value.count for labels, value in values(decoded).items()}
    assert counts == {("/system.slice/db.service",): 1, ("other",): 3}
    assert decoded.dropped == 2


def test_other_is_never_one_too_many() -> None:
    tables = {"run_queue_all": [Row(0, waits(MS))], "run_queue": [Row(7, waits(MS)), Row(99, waits(MS))]}
    decoded = decode(tables, replace(CGROUP, max_series=2))
    counts = {labels: value.count for labels, value in values(decoded).items()}
    assert counts == {("/system.slice/db.service",): 1, ("other",): 2}
    assert decoded.dropped == 0


def test_exemplars_tell_who_waited() -> None:
    octave = SECONDS.octave(3 * MS)
    one = {
        "stamp_ns": 1, "time_ns": 5_000_000_000, "value": 3 * MS, "pid": 42,
        "comm": [int.from_bytes(b"postgres", "little"), 0], "cgroup": 7, "words": [0],
    }  # fmt: skip
    places = [one if place == octave else None for place in range(27)]
    tables = {"run_queue_all": [Row(0, waits(3 * MS, exemplars=places))], "run_queue": []}
    labels = (("pid", "42"), ("comm", "postgres"), ("cgroup", "/system.slice/db.service"))
    assert values(decode(tables, NONE))[()].exemplars == {octave: Exemplar(labels, 0.003, 1_700_000_105.0)}
    nobody = [None] * 27
    tables = {"run_queue_all": [Row(0, waits(3 * MS, exemplars=nobody))], "run_queue": []}
    assert values(decode(tables, NONE))[()].exemplars == {}


def test_of_exemplars_in_one_bucket_the_newest_stays() -> None:
    octave = SECONDS.octave(3 * MS)

    def places(pid: int, time_ns: int) -> list[Any]:
        one = {
            "stamp_ns": 1,
            "time_ns": time_ns,
            "value": 3 * MS,
            "pid": pid,
            "comm": [0, 0],
            "cgroup": 0,
            "words": [0],
        }
        return [one if place == octave else None for place in range(27)]

    gone = [Row(98, waits(3 * MS, exemplars=places(1, 20))), Row(99, waits(3 * MS, exemplars=places(2, 10)))]
    found = values(decode({"run_queue_all": [Row(0, waits())], "run_queue": gone}, CGROUP))["other",]
    assert dict(found.exemplars[octave].labels)["pid"] == "1"


def test_options_choose_what_is_compiled() -> None:
    plain = {"MAX_TASKS": MAX_TASKS}
    assert COLLECTOR.defines({"by": "none", "max_cgroups": 16}) == plain
    assert COLLECTOR.defines({"by": "cgroup", "max_cgroups": 16}) == plain | {"BY_CGROUP": 1, "MAX_CGROUPS": 16}
