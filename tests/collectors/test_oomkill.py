# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

import pytest

from collectors.oomkill import COLLECTOR, MESSAGE_ID, VMSTAT, cgroup_path, decode, event
from daemon.declare import Context, Row

CONTEXT = Context(
    options={"events": True}, max_series=10, created=5.0, cgroup_path=lambda _: "", wall_clock=lambda ns: ns / 1e9
)
PAGE = os.sysconf("SC_PAGE_SIZE")
OTHERS = [Row(scope, 0) for scope in range(3)]


def words(name: bytes) -> list[int]:
    raw = name.ljust(16, b"\0")
    return [int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")]


def levels(*names: str) -> list[dict[str, bytes]]:
    """Innermost first, as the program walks up."""
    return [{"name": name.encode().ljust(80, b"\0")} for name in (*reversed(names), *[""] * (12 - len(names)))]


def kills(count: int, *path: str) -> dict[str, Any]:
    return {"count": count, "deeper": 0, "path": levels(*path), "count_exemplar": None}


def test_path_is_built_from_the_root() -> None:
    assert cgroup_path(levels("system.slice", "db.service"), deeper=0) == "/system.slice/db.service"
    assert cgroup_path(levels(), deeper=0) == "/"


def test_path_of_twelve_levels_is_whole_unless_there_are_more() -> None:
    twelve = [f"l{i}" for i in range(12)]
    assert cgroup_path(levels(*twelve), deeper=0) == "/" + "/".join(twelve)
    assert cgroup_path(levels(*twelve), deeper=1) == "…/" + "/".join(twelve)


def test_name_that_is_not_utf8_is_shown_all_the_same() -> None:
    assert cgroup_path([{"name": b"a\xff\0"}], deeper=0) == "/a\ufffd"


def test_every_scope_is_there_at_zero() -> None:
    (family,) = decode({"kills": [], "kills_other": OTHERS}, CONTEXT).families
    found = {series.labels: series.value for series in family.series}
    assert found == {("unknown", "other"): 0, ("global", "other"): 0, ("memcg", "other"): 0}


def test_groups_of_one_path_add_up() -> None:
    rows = [Row({"cgroup": 7, "scope": 2}, kills(2, "a")), Row({"cgroup": 9, "scope": 2}, kills(3, "a"))]
    (family,) = decode({"kills": rows, "kills_other": OTHERS}, CONTEXT).families
    assert {series.labels: series.value for series in family.series}["memcg", "/a"] == 5


def test_what_passes_max_series_is_other() -> None:
    rows = [Row({"cgroup": number, "scope": 1}, kills(1, f"g{number}")) for number in range(20)]
    decoded = decode({"kills": rows, "kills_other": OTHERS}, CONTEXT)
    assert sum(series.value for series in decoded.families[0].series) == 20
    assert decoded.dropped == 13


def test_event_is_a_sentence_and_its_facts() -> None:
    record = {
        "time_ns": 3_000_000_000, "pid": 42, "comm": words(b"db"), "cgroup": 7, "anon_pages": 512, "file_pages": 256,
        "shmem_pages": 0, "scope": 2, "killer_pid": 41, "killer_comm": words(b"loader"), "thread": 43,
        "oom_score_adj": -5, "deeper": 0, "path": levels("system.slice", "db.service"),
    }  # fmt: skip
    found = event(record, CONTEXT)
    assert (found.message_id, found.priority, found.timestamp) == (MESSAGE_ID, 3, 3.0)
    assert found.message == (
        f"OOM kill: db (pid 42) in cgroup /system.slice/db.service with {768 * PAGE >> 20} MiB resident was killed "
        "because a memory cgroup reached its limit"
    )
    assert found.fields["unit"] == "db.service"
    assert found.fields["rss_bytes"] == 768 * PAGE
    assert found.fields["killer_comm"] == "loader"


def test_exemplar_is_the_newest_of_a_label_set() -> None:
    def killed(pid: int, time_ns: int) -> dict[str, Any]:
        raw = {"pid": pid, "comm": words(b'a\n"b'), "cgroup": 0, "words": [0], "value": 1, "time_ns": time_ns}
        return kills(1, "a") | {"count_exemplar": raw}

    rows = [Row({"cgroup": number, "scope": 2}, killed(number, time)) for number, time in ((7, 2 * 10**9), (9, 10**9))]
    (family,) = decode({"kills": rows, "kills_other": OTHERS}, CONTEXT).families
    (series,) = [series for series in family.series if series.labels == ("memcg", "/a")]
    assert series.value == 2
    assert series.exemplar
    assert (series.exemplar.labels, series.exemplar.timestamp) == ((("pid", "7"), ("comm", 'a\n"b')), 2.0)


IN_POD = ("kubepods", "pod1b2c3d4e-0123-4567-89ab-0123456789ab", "c0ffee12" * 8)
POD = (("container", "c0ffee12c0ff"), ("pod", "1b2c3d4e-0123-4567-89ab-0123456789ab"))


def test_exemplar_of_a_pod_names_it_and_its_container() -> None:
    raw = {"pid": 7, "comm": words(b"db"), "cgroup": 0, "words": [0], "value": 1, "time_ns": 1}
    row = Row({"cgroup": 7, "scope": 2}, kills(1, *IN_POD) | {"count_exemplar": raw})
    (family,) = decode({"kills": [row], "kills_other": OTHERS}, CONTEXT).families
    (series,) = [series for series in family.series if series.labels == ("memcg", f"/{'/'.join(IN_POD)}")]
    assert series.exemplar
    assert series.exemplar.labels == (("pid", "7"), ("comm", "db"), *POD)


def test_event_in_a_pod_names_it_and_its_container() -> None:
    record = {
        "time_ns": 0, "pid": 1, "comm": words(b"x"), "cgroup": 1, "anon_pages": 0, "file_pages": 0, "shmem_pages": 0,
        "scope": 2, "killer_pid": 1, "killer_comm": words(b"x"), "thread": 1, "oom_score_adj": 0, "deeper": 0,
        "path": levels(*IN_POD),
    }  # fmt: skip
    fields = event(record, CONTEXT).fields
    assert {name: fields[name] for name in ("container", "pod")} == dict(POD)


@pytest.mark.parametrize(("scope", "why"), [(0, "memory ran out"), (1, "the machine ran out of memory")])
def test_event_says_what_is_known_of_the_cause(scope: int, why: str) -> None:
    record = {
        "time_ns": 0, "pid": 1, "comm": words(b"x"), "cgroup": 1, "anon_pages": 0, "file_pages": 0, "shmem_pages": 0,
        "scope": scope, "killer_pid": 1, "killer_comm": words(b"x"), "thread": 1, "oom_score_adj": 0, "deeper": 1,
        "path": levels("a"),
    }  # fmt: skip
    found = event(record, CONTEXT)
    assert found.message.endswith(f"in cgroup …/a with 0 MiB resident was killed because {why}")
    assert found.fields["unit"] == ""


def test_kernels_own_count() -> None:
    counted = COLLECTOR.truth.counted  # type: ignore[union-attr]
    tables = {
        "kills": [Row({"cgroup": 7, "scope": 2}, kills(2, "a"))],
        "kills_other": [Row(0, 0), Row(1, 3)],
        "kills_again": [Row(0, 1)],
    }
    vmstat = "nr_free_pages 5\noom_kill {}\noom_kill_else 9\n"
    began, now = {VMSTAT: vmstat.format(10)}, {VMSTAT: vmstat.format(16)}
    assert counted(began, now, tables) == (5, 5), "one of its six it counted twice"
    tables["kills_other"] = [Row(0, 1), Row(1, 3)]
    assert counted(began, now, tables) is None, "of unknown scope, because symbols are hidden"
    assert counted({VMSTAT: ""}, {VMSTAT: ""}, {name: [] for name in tables}) == (0, 0), "a kernel that does not tell"


def test_ring_buffer_is_compiled_in_only_when_events_are_wanted() -> None:
    assert COLLECTOR.defines({"events": True}) == {"MAX_CGROUPS": 1000, "EVENTS_ON": 1, "RING_PAGES": 64}
    assert COLLECTOR.defines({"events": False}) == {"MAX_CGROUPS": 1000}
