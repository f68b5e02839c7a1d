# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collectors.cachestat import COLLECTOR, decode
from daemon.declare import Context, Row

CONTEXT = Context(options={}, max_series=10, created=5.0, cgroup_path=lambda _: "", wall_clock=lambda _: 0.0)


def test_each_counter_is_a_metric_of_its_own() -> None:
    decoded = decode({"pages": [Row(index, 10 * index) for index in range(4)]}, CONTEXT)
    found = {family.metric.name: family.series[0].value for family in decoded.families}
    assert found == {
        "bpf_page_cache_accesses": 0,
        "bpf_page_cache_misses": 10,
        "bpf_page_cache_added": 20,
        "bpf_page_cache_dirtied": 30,
    }
    assert all(family.series[0].created == 5.0 for family in decoded.families)


def test_unit_is_said_in_every_help() -> None:
    assert all("pages" in metric.help for metric in COLLECTOR.metrics({}))
