# SPDX-License-Identifier: Apache-2.0
"""Fleet: many hosts, worst first. Reads recording rules only, so that a thousand hosts cost what one does."""

from __future__ import annotations

from grafana.parts import ANY, Column, Help, Query, board, graph, heatmap, row, table, tile

_WAIT = "instance:bpf_run_queue_latency_seconds:p99_rate5m{HOST}"
_DISK = (
    "max by (job, instance) "
    '(instance_device_operation:bpf_block_io_duration_seconds:p99_rate5m{HOST,operation!="discard"})'
)
_ALERTS = 'count by (job, instance) (ALERTS{HOST,alertstate="firing"})'
_KILLS = "round(sum by (job, instance) (increase(instance_scope:bpf_oom_kills:sum{HOST}[1d])))"
_RULES = " Needs the recording rules."

_PANELS = (
    tile(
        "Hosts up", "none",
        Help("Hosts whose bpfmetricsd answers.", "all of them.", "compare with your inventory."),
        Query("sum(up{HOST})"), width=8,
    ),
    tile(
        "Hosts down", "none",
        Help("Hosts that Prometheus knows of and that do not answer.", "0.",
             "the table has them at its end, without numbers. Then: systemctl status bpfmetricsd there."),
        Query("sum(1 - up{HOST})"), ANY, 8,
    ),
    tile(
        "Hosts with alerts", "none",
        Help("Hosts with at least one firing alert." + _RULES, "0.", "see the table: most alerts first."),
        Query(f"count({_ALERTS}) or vector(0)"), ANY, 8,
    ),
    table(
        "Hosts, worst first",
        Help("Each host's state of the last five minutes; OOM kills of the last day." + _RULES,
             "no red. Colours as on Host overview.",
             "click the host's name. Many hosts red in one column: a shared cause, such as storage or network."),
        [
            Column("Alerts", f"{_ALERTS} or 0 * up{{HOST}}", "none", ANY),
            Column("Wait for a CPU, p99", _WAIT, "s", (0.01, 0.05)),
            Column("OOM kills", _KILLS, "none", ANY),
            Column("Slowest disk, p99", _DISK, "s", (0.02, 0.1)),
            Column("Page cache hits", "instance:bpf_page_cache_hit:ratio_rate5m{HOST}", "percentunit", (0.9, 0.5)),
            Column("Retransmits", "instance:bpf_tcp_retransmits:rate5m{HOST}", "pps", (10, 100)),
            Column("Collectors down", "sum by (job, instance) (1 - bpfmetricsd_collector_up{HOST})", "none", ANY),
        ],
        sort="Alerts", height=12, to="bpf-host",
    ),
    row("Worst hosts over time"),
    graph(
        "Wait for a CPU, p99, ten longest", "s",
        Help("One wait for a CPU in a hundred is at least this long." + _RULES, "under 10 ms.",
             "move work from these hosts to others."),
        Query(f"topk(10, {_WAIT})", "{{instance}}"),
    ),
    graph(
        "Slowest disk, p99, ten longest", "s",
        Help("One request in a hundred to the host's slowest device takes at least this long." + _RULES,
             "as the kind of disk has it.", "open Block I/O of the host. Several at once: shared storage."),
        Query(f"topk(10, {_DISK})", "{{instance}}"),
    ),
    graph(
        "Page cache misses, ten most", "short",
        Help("Accessed pages each second that were not in memory." + _RULES, "as the work has it.",
             "a host that left its group: its memory is used otherwise, or it got other work."),
        Query("topk(10, instance:bpf_page_cache_misses:rate5m{HOST})", "{{instance}}"),
    ),
    graph(
        "Retransmits, ten most", "pps",
        Help("TCP segments sent again each second." + _RULES, "under 10 a second.",
             "hosts of one rack or zone: its switch or uplink. Open TCP of one of them."),
        Query("topk(10, instance:bpf_tcp_retransmits:rate5m{HOST})", "{{instance}}"),
    ),
    row("All hosts together"),
    heatmap(
        "Wait for a CPU", "s",
        Help("All waits for a CPU on all hosts: buckets are the same everywhere, so the sum is exact." + _RULES,
             "one bright band below 100 us.", "a second band: find its hosts in the table."),
        'job:bpf_run_queue_latency_seconds_bucket:rate5m{job=~"$job"}',
    ),
    heatmap(
        "Device time", "s",
        Help("All block requests on all hosts: buckets are the same everywhere, so the sum is exact." + _RULES,
             "a band for each kind of device.", "a band that fades in higher up: find its hosts in the table."),
        'job_operation:bpf_block_io_duration_seconds_bucket:rate5m{job=~"$job"}',
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-fleet", "Fleet", "Many hosts, worst first.", _PANELS
)  # fmt: skip
