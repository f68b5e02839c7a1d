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


def test_tracepoints_come_before_functions_and_probe_reads_last() -> None:
    """Each kind that loads directly before each that does not; what reads see more before what sees less."""
    (accesses, *_) = COLLECTOR.parts
    kinds = [sorted({hook.kind for hook in variant.programs.values()}) for variant in accesses.variants]
    assert kinds == [
        ["fentry", "tp_btf"], ["tp_btf"], *3 * [["fentry", "fexit"]], ["raw_tp"], ["kprobe", "kretprobe"],
    ]  # fmt: skip
    assert "filemap_splice_read" in accesses.variants[2].programs


def test_every_variant_of_reads_by_a_function_says_so_to_the_program() -> None:
    for variant in COLLECTOR.parts[0].variants:
        tracepoints = "mm_filemap_get_pages" in variant.programs
        assert variant.define == ("" if tracepoints else "READ_FUNCTION")


def test_kprobes_are_asked_for_only_where_a_link_keeps_them() -> None:
    for variant in COLLECTOR.parts[0].variants:
        kprobes = any(hook.kind == "kprobe" for hook in variant.programs.values())
        assert variant.needs == (("bpf_perf_link.perf_file",) if kprobes else ())


def test_kretprobes_and_the_tracepoint_that_misses_huge_pages_are_approximate() -> None:
    for variant in COLLECTOR.parts[0].variants:
        hooks = {(hook.kind, hook.target) for hook in variant.programs.values()}
        kinds = {kind for kind, target in hooks if target == "mm_filemap_map_pages" or kind == "kretprobe"}
        assert bool(variant.approximate) == bool(kinds)


def test_counters_are_fixed() -> None:
    assert [metric.name for metric in COLLECTOR.metrics({})] == [
        "bpf_page_cache_accesses", "bpf_page_cache_misses", "bpf_page_cache_added", "bpf_page_cache_dirtied",
    ]  # fmt: skip
    assert COLLECTOR.options == ()
    assert COLLECTOR.defines({}) == {}
