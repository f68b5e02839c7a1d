# SPDX-License-Identifier: Apache-2.0
"""bpfmetricsd itself: does each collector count, does it count all, and what does that cost?"""

from __future__ import annotations

from grafana.parts import ANY, Column, Help, Query, board, graph, row, table, tile

_PANELS = (
    tile(
        "Collectors up", "none",
        Help("Collectors that count, on all chosen hosts.", "six a host with the shipped configuration.",
             "bpfmetricsd status says why one is down; bpfmetricsd load brings back what can be."),
        Query("sum(bpfmetricsd_collector_up{HOST})"),
    ),
    tile(
        "Collectors down", "none",
        Help("Collectors that should count and do not.", "0.", "bpfmetricsd status says why."),
        Query("sum(1 - bpfmetricsd_collector_up{HOST})"), ANY,
    ),
    tile(
        "Lowest coverage", "percentunit",
        Help("Events counted here for each event that the kernel counted itself; the lowest of all collectors.",
             "99 % or more.", "see Coverage below for the collector, and its hooks in the table."),
        Query("min(bpfmetricsd_coverage_ratio{HOST})"), (0.99, 0.95),
    ),
    tile(
        "Events lost", "none",
        Help("Events that were not counted or not told, in the time range above.", "0.",
             "see Lost below for collector and reason."),
        Query("sum(increase(bpfmetricsd_events_lost_total{HOST}[$__range]))", instant=True), (1, 100),
    ),
    tile(
        "Memory of the maps", "bytes",
        Help("Kernel memory of all maps, on all chosen hosts.", "10 to 20 MB a host.",
             "lower max_devices, max_inflight or max_connections."),
        Query("sum(bpfmetricsd_map_memory_bytes{HOST})"),
    ),
    tile(
        "Slowest reading", "s",
        Help("What the last reading of a collector's maps took, the longest.", "a few milliseconds.",
             "many series (lower max_series), or a host without CPU to spare."),
        Query("max(bpfmetricsd_collector_read_duration_seconds{HOST})"), (0.1, 1),
    ),
    row("Does it count?"),
    table(
        "Hooks",
        Help("Where each program is attached, and whether its count is exact.", "exact everywhere.",
             "approximate: this kernel lacks the better hook. bpfmetricsd check says which one."),
        [Column("", "count by (instance, collector, program, hook, fidelity) (bpfmetricsd_collector_hook_info{HOST})")],
        width=12,
    ),
    table(
        "Versions",
        Help("Versions of bpfmetricsd, of the bcc that compiled its programs, and of the kernel.",
             "one line, but during an upgrade.", "hosts that stayed behind: upgrade them."),
        [Column("Hosts", "count by (version, bcc, kernel) (bpfmetricsd_build_info{HOST})", "none")], width=6,
    ),
    table(
        "Counting since",
        Help("How long each collector has counted into its present maps.", "since boot, or since the last upgrade that"
             " changed the maps.", "shorter: somebody unloaded it, or the maps had to be made anew."),
        [Column("For", "time() - bpfmetricsd_collector_started_timestamp_seconds{HOST}", "s")], sort="For", width=6,
    ),
    row("Does it count all?"),
    graph(
        "Coverage", "percentunit",
        Help("Events counted here for each event that the kernel counted itself, where it does, since counting began.",
             "99 % or more.",
             "a hook that misses some, or events lost: see the next panel."),
        Query("min by (collector) (bpfmetricsd_coverage_ratio{HOST})", "{{collector}}"),
    ),
    graph(
        "Lost", "cps",
        Help("Events each second that were not counted (map_full, task_state, recursion) or not told (ring_full).",
             "0.",
             "map_full: raise max_inflight or max_connections. ring_full: the server does not keep up or is down."),
        Query("sum by (collector, reason) (rate(bpfmetricsd_events_lost_total{HOST}[$__rate_interval]))",
              "{{collector}}: {{reason}}"),
    ),
    graph(
        "Fill of the maps", "percentunit",
        Help("Entries for each entry that fits, the fullest host.", "under 80 %.",
             "raise the option that sizes the map, before events are lost."),
        Query("max by (collector, map) (bpfmetricsd_map_entries{HOST} / bpfmetricsd_map_max_entries{HOST})",
              "{{collector}} {{map}}"),
    ),
    graph(
        "Series left out", "short",
        Help("Label sets beyond max_series, which are added to the series `other`.", "0.",
             "raise max_series, or choose labels with fewer values."),
        Query("sum by (collector) (bpfmetricsd_series_dropped_total{HOST})", "{{collector}}"),
    ),
    row("What does it cost?"),
    graph(
        "CPU of the programs", "percentunit",
        Help("Share of one CPU that the programs take; only while kernel.bpf_stats_enabled is 1, which itself costs.",
             "under 1 %.", "the collector on top sits on a hook that runs very often: can you do without it?"),
        Query("sum by (collector) (rate(bpfmetricsd_program_run_seconds_total{HOST}[$__rate_interval]))",
              "{{collector}}"), stack=True,
    ),
    graph(
        "Time of one run", "s",
        Help("Time of one run of each program, the kernel's own measuring (50 to 60 ns) included; only while"
             " kernel.bpf_stats_enabled is 1.", "100 to 500 ns.",
             "more: caches are cold or the host is overcommitted."),
        Query("sum by (program) (rate(bpfmetricsd_program_run_seconds_total{HOST}[$__rate_interval]))"
              " / sum by (program) (rate(bpfmetricsd_program_runs_total{HOST}[$__rate_interval]))", "{{program}}"),
    ),
    graph(
        "Reading", "s",
        Help("What the last reading of each collector's maps took, the slowest host.", "a few milliseconds.",
             "many series (lower max_series), or a host without CPU to spare."),
        Query("max by (collector) (bpfmetricsd_collector_read_duration_seconds{HOST})", "{{collector}}"),
    ),
    graph(
        "Scrapes", "s",
        Help("What a scrape took, as Prometheus sees it.", "under 100 ms.",
             "compare with Reading: the rest is rendering, compression and the network."),
        Query("scrape_duration_seconds{HOST}", "{{instance}}"),
    ),
    graph(
        "Memory of the server", "bytes",
        Help("Resident memory of the server process.", "under 40 MB, and level.", "it grows: report it with /status."),
        Query("process_resident_memory_bytes{HOST}", "{{instance}}"),
    ),
    graph(
        "CPU of the server", "percentunit",
        Help("Share of one CPU that the server process takes.", "under 1 %.",
             "scrape less often, choose collectors with collect[], or lower max_series."),
        Query("rate(process_cpu_seconds_total{HOST}[$__rate_interval])", "{{instance}}"),
    ),
    graph(
        "Memory of the maps", "bytes",
        Help("Kernel memory of each collector's maps, the largest host.", "10 to 20 MB together.",
             "lower max_devices, max_inflight or max_connections."),
        Query("max by (collector) (sum by (instance, collector) (bpfmetricsd_map_memory_bytes{HOST}))",
              "{{collector}}"), stack=True,
    ),
    graph(
        "Samples of a scrape", "short",
        Help("Samples that a scrape brings: what Prometheus stores and pays for.", "1,000 to 5,000.",
             "by: cgroup, by: remote_subnet and local_ports multiply them; max_series bounds them."),
        Query("scrape_samples_scraped{HOST}", "{{instance}}"),
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-self", "bpfmetricsd itself", "Does each collector count, does it count all, and what does that cost?", _PANELS
)  # fmt: skip
