# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collectors.cachestat import COLLECTOR, decode
from daemon.declare import Context, Row, Variant

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


READS, FAULTS, *_ = COLLECTOR.parts
KRETPROBE, MAP_AROUND = "kretprobe:filemap_read", "mm_filemap_map_pages"


def hooks(variant: Variant) -> str:
    return " ".join(map(str, variant.programs.values()))


def test_what_loads_directly_comes_first_and_what_sees_more_before_what_sees_less() -> None:
    assert [hooks(one) for one in READS.variants] == [
        "tp_btf:mm_filemap_get_pages",
        "fexit:filemap_splice_read fexit:filemap_read",
        "fexit:filemap_read",
        "fexit:generic_file_buffered_read",
        "raw_tp:mm_filemap_get_pages",
        "kprobe:filemap_read kretprobe:filemap_read",
    ]
    assert [hooks(one) for one in FAULTS.variants] == [
        "tp_btf:mm_filemap_fault fentry:filemap_map_pages",
        "tp_btf:mm_filemap_fault tp_btf:mm_filemap_map_pages",
        "fentry:filemap_fault fentry:filemap_map_pages",
        "raw_tp:mm_filemap_fault raw_tp:mm_filemap_map_pages",
        "kprobe:filemap_fault kprobe:filemap_map_pages",
    ]


def test_every_variant_of_reads_by_a_function_says_so_to_the_program() -> None:
    for variant in READS.variants:
        assert variant.define == ("" if "mm_filemap_get_pages" in variant.programs else "READ_FUNCTION")


def test_kprobes_are_asked_for_only_where_a_link_keeps_them() -> None:
    for variant in (*READS.variants, *FAULTS.variants):
        assert variant.needs == (("bpf_perf_link.perf_file",) if "kprobe:" in hooks(variant) else ())


def test_kretprobes_and_the_tracepoint_that_misses_huge_pages_are_approximate() -> None:
    for variant in (*READS.variants, *FAULTS.variants):
        assert bool(variant.approximate) == (KRETPROBE in hooks(variant) or MAP_AROUND in hooks(variant))


def test_counters_are_fixed() -> None:
    assert [metric.name for metric in COLLECTOR.metrics({})] == [
        "bpf_page_cache_accesses", "bpf_page_cache_misses", "bpf_page_cache_added", "bpf_page_cache_dirtied",
    ]  # fmt: skip
    assert COLLECTOR.options == ()
    assert COLLECTOR.defines({}) == {}
