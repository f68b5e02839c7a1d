# SPDX-License-Identifier: Apache-2.0
"""OOM kills in a memory cgroup against the kernel's own count in /proc/vmstat."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collectors import oomkill
from tests.kernel.memory import oom_kill

pytestmark = pytest.mark.kernel
KILLS = "bpf_oom_kills"


def vmstat() -> int:
    return oomkill._kills(Path("/proc/vmstat").read_text())


def logged() -> dict[int, int]:
    """Resident bytes of the victims in the kernel's log, by pid."""
    text = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.search(r"Killed process (\d+) .*anon-rss:(\d+)kB, file-rss:(\d+)kB, shmem-rss:(\d+)kB", line)
        if match:
            pid, *kilobytes = map(int, match.groups())
            found[pid] = sum(kilobytes) << 10
    return found


@pytest.mark.parametrize("forbid", ["", "tp_btf"])
def test_kills_equal_the_kernels_count_by_the_victims_cgroup(load: Callable[..., Any], forbid: str) -> None:
    loaded = load("oomkill", forbid=forbid)
    assert loaded.series(KILLS) == {(scope, "other"): 0 for scope in oomkill.SCOPES}
    before = vmstat()
    for _ in range(3):
        oom_kill("bpfmetricsd-a.service")
    oom_kill("bpfmetricsd-b.slice")
    kills = loaded.series(KILLS)
    assert kills["memcg", "/bpfmetricsd-a.service"] == 3
    assert kills["memcg", "/bpfmetricsd-b.slice"] == 1
    assert sum(kills.values()) == vmstat() - before == 4


def test_event_has_every_fact_and_its_own_time(load: Callable[..., Any]) -> None:
    loaded = load("oomkill")
    earliest = time.time()
    pid = oom_kill("bpfmetricsd-c.service")
    latest = time.time()
    loaded.engine.drain()
    (event,) = [event for event in loaded.events if event.fields["pid"] == pid]
    assert earliest - 0.1 <= event.timestamp <= latest + 0.1
    assert event.message_id == oomkill.MESSAGE_ID
    facts = event.fields
    assert (facts["cgroup"], facts["unit"]) == ("/bpfmetricsd-c.service", "bpfmetricsd-c.service")
    assert facts["scope"] == "memcg"
    assert facts["comm"].startswith("python")
    assert facts["rss_bytes"] == pytest.approx(logged()[pid], rel=0.01)
    assert facts["rss_bytes"] == facts["anon_bytes"] + facts["file_bytes"] + facts["shmem_bytes"]


def test_exemplar_names_the_victim(load: Callable[..., Any]) -> None:
    loaded = load("oomkill")
    pid = oom_kill("bpfmetricsd-d.service")
    (series,) = [one for one in loaded.read()[KILLS].series if one.labels == ("memcg", "/bpfmetricsd-d.service")]
    assert series.exemplar
    assert dict(series.exemplar.labels)["pid"] == str(pid)


def test_a_deep_path_loses_its_outermost_parts(load: Callable[..., Any]) -> None:
    from daemon import cgroups

    root = cgroups.mount_point()
    assert root
    parts = [f"d{number}" for number in range(14)]
    made = [root.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    loaded = load("oomkill")
    try:
        for folder in made:
            folder.mkdir()
        oom_kill("/".join([*parts, "leaf"]))
    finally:
        for folder in reversed(made):
            folder.rmdir()
    (path,) = [labels[1] for labels, count in loaded.series(KILLS).items() if count]
    assert path == "…/" + "/".join([*parts[-11:], "leaf"])


def test_sigkill_from_a_process_is_no_oom_kill(load: Callable[..., Any]) -> None:
    loaded = load("oomkill")
    for _ in range(20):
        victim = subprocess.Popen(["sleep", "60"])
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    assert sum(loaded.series(KILLS).values()) == 0
