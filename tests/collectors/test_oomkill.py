# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

from collectors.oomkill import MESSAGE_ID, cgroup_path, decode, event
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
    return {"count": count, "path": levels(*path), "count_exemplar": None}


def test_path_is_built_from_the_root() -> None:
    assert cgroup_path(levels("system.slice", "db.service")) == "/system.slice/db.service"
    assert cgroup_path(levels()) == "/"
    assert cgroup_path(levels(*[f"l{i}" for i in range(12)])).startswith("…/l0/")


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
        "oom_score_adj": -5, "path": levels("system.slice", "db.service"),
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
