# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from daemon.model import Family, Metric, Series
from daemon.selfmetrics import process_families


def test_fixture(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu 1 2 3\nbtime 1700000000\n")
    process = tmp_path / "self"
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "0").touch()
    (process / "limits").write_text("Max open files            1024                 524288               files\n")
    ticks = os.sysconf("SC_CLK_TCK")
    fields = ["0"] * 50
    fields[11], fields[12], fields[19], fields[20], fields[21] = (
        str(3 * ticks),
        str(ticks // 2),
        str(60 * ticks),
        "1048576",
        "2",
    )
    (process / "stat").write_text(f"1 (bpf) metricsd) {' '.join(fields)}\n")

    families = process_families(ProcessCollector(proc=str(tmp_path), registry=CollectorRegistry()))

    assert {family.metric.name: (family.metric.type, family.metric.unit) for family in families} == {
        "process_virtual_memory_bytes": ("gauge", "bytes"),
        "process_resident_memory_bytes": ("gauge", "bytes"),
        "process_start_time_seconds": ("gauge", "seconds"),
        "process_cpu_seconds": ("counter", "seconds"),
        "process_open_fds": ("gauge", ""),
        "process_max_fds": ("gauge", ""),
    }
    assert {family.metric.name: family.series for family in families} == {
        "process_virtual_memory_bytes": [Series((), 1048576.0)],
        "process_resident_memory_bytes": [Series((), 2.0 * os.sysconf("SC_PAGESIZE"))],
        "process_start_time_seconds": [Series((), 1700000060.0)],
        "process_cpu_seconds": [Series((), 3.5)],
        "process_open_fds": [Series((), 1.0)],
        "process_max_fds": [Series((), 1024.0)],
    }
    assert families[3] == Family(
        Metric("process_cpu_seconds", "counter", "Total user and system CPU time spent in seconds.", unit="seconds"),
        [Series((), 3.5)],
    )


def test_no_proc(tmp_path: Path) -> None:
    assert process_families(ProcessCollector(proc=str(tmp_path), registry=CollectorRegistry())) == []


def test_this_process() -> None:
    values = {family.metric.name: family.series[0].value for family in process_families()}
    assert values["process_resident_memory_bytes"] == pytest.approx(resident_bytes(), rel=0.5)
    assert values["process_cpu_seconds"] == pytest.approx(sum(os.times()[:2]), abs=1)
    assert values["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
