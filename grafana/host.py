# SPDX-License-Identifier: Apache-2.0
"""Host overview: one host at a glance, in the order in which one looks when it is slow.

The tiles answer which of CPU, disk, memory and network it is; below, each has a row of its own.
"""

from __future__ import annotations

from collectors.oomkill import MESSAGE_ID
from grafana.parts import ANY, Help, Query, board, buckets, graph, grown, heatmap, quantile, row, tile, total

_RUN_QUEUE = "bpf_run_queue_latency_seconds"
_DEVICE = "bpf_block_io_duration_seconds"
_QUEUE = "bpf_block_io_queue_duration_seconds"
_NO_DISCARDS = 'HOST,operation!="discard"'
_KILLS = "sum by (job, instance) (bpf_oom_kills_total{HOST})"
_ERRORS = (
    'sum by (job, instance) (bpf_block_io_errors_total{HOST,error!~"e?(op)?notsupp?|e?again"})'
    f" or 0 * sum by (job, instance) ({_DEVICE}_count{{HOST}})"
)
HITS = (
    "1 - sum(rate(bpf_page_cache_misses_total{HOST}[$__rate_interval]))"
    " / (sum(rate(bpf_page_cache_accesses_total{HOST}[$__rate_interval])) > 0)"
)

_TILES = (
    tile(
        "CPU: wait for a CPU, p99", "s",
        Help("One task in a hundred waits at least this long before it gets a CPU.",
             "under 10 ms; a host with idle CPUs stays under 1 ms.",
             "too many tasks for the CPUs, or a CPU limit. Open Scheduler: which cgroup waits most?"),
        Query(quantile(0.99, _RUN_QUEUE)), (0.01, 0.05), to="bpf-scheduler",
    ),
    tile(
        "Errors: OOM kills", "none",
        Help("Processes killed for want of memory, in the time range above.", "0.",
             "open Page cache and OOM for the cgroup. Scope memcg: its limit is too low, or it leaks. Scope global: the"
             " host is too small for what runs on it."),
        total(_KILLS), ANY, 3, to="bpf-memory",
    ),
    tile(
        "Errors: failed I/O", "none",
        Help("Block requests that failed, in the time range above; not those that a device does not support.", "0.",
             "open Block I/O for the device and the error, then read the kernel log. medium, ioerr, target: replace the"
             " disk. timeout, transport: look at cable, controller, network. nospc: the pool below is full."),
        total(_ERRORS), ANY, 3, to="bpf-block-io",
    ),
    tile(
        "Disk: slowest device, p99", "s",
        Help("One request in a hundred takes the slowest device at least this long; discards left out.",
             "NVMe under 1 ms, other SSDs under 10 ms, rotating and network disks under 50 ms.",
             "open Block I/O. More requests than before: find who reads or writes (exemplars name processes). As many"
             " as before: the device is failing, or its neighbours are busy."),
        Query(f"max({quantile(0.99, _DEVICE, _NO_DISCARDS, 'device')})"),
        (0.02, 0.1), to="bpf-block-io",
    ),
    tile(
        "Memory: page cache hits", "percentunit",
        Help("Share of page accesses by reads and faults that found their page in memory.",
             "above 90 % on most hosts; batch jobs that read everything once have far less.",
             "a fall means that the cache has shrunk or what is read has grown. Open Page cache and OOM."),
        Query(HITS), (0.9, 0.5), to="bpf-memory",
    ),
    tile(
        "Network: retransmits", "pps",
        Help("TCP segments sent again each second.", "under 10 a second, or under 1 % of what is sent.",
             "open TCP. kind data: loss on the way. kind syn: the other side does not answer. kind synack: clients do"
             " not come back."),
        Query("sum(rate(bpf_tcp_retransmits_total{HOST}[$__rate_interval]))"), (10, 100), 3, to="bpf-tcp",
    ),
    tile(
        "Collectors down", "none",
        Help("Collectors of bpfmetricsd on this host that do not count.", "0. `no data`: the host is not scraped.",
             "open bpfmetricsd itself. While one is down its tile says nothing."),
        Query("sum(1 - bpfmetricsd_collector_up{HOST})"), ANY, 3, to="bpf-self",
    ),
)  # fmt: skip

_PANELS = (
    *_TILES,
    graph(
        "Where work waits", "short",
        Help("How many tasks wait for a CPU, and how many block requests wait in queues or are with a device, on"
             " average: the seconds waited in each second.",
             "each line near zero. Some requests with a device are normal on a busy disk, which works on many at once.",
             "the line that rose with the trouble names the resource: its row below says more."),
        Query(f"sum(rate({_RUN_QUEUE}_sum{{HOST}}[$__rate_interval]))", "tasks waiting for a CPU"),
        Query(f"sum by (device) (rate({_QUEUE}_sum{{HOST}}[$__rate_interval]))", "requests queued for {{device}}"),
        Query(f"sum by (device) (rate({_DEVICE}_sum{{HOST}}[$__rate_interval]))", "requests with {{device}}"),
        width=24, height=7,
    ),
    row("Load and run queue"),
    heatmap(
        "Wait for a CPU", "s",
        Help("How long runnable tasks waited for a CPU.",
             "one bright band below 100 us; some dots up to a few milliseconds.",
             "a second band at milliseconds: tasks queue behind others. Waits that end at the same height: a CPU"
             " limit. The points name processes."),
        buckets(_RUN_QUEUE),
    ),
    graph(
        "Tasks waiting, by cgroup", "short",
        Help("Tasks that wait for a CPU on average, ten largest cgroups; one line unless runqlat has `by: cgroup`.",
             "well under one for each CPU.", "the top line is who wants more CPU than there is."),
        Query(f"topk(10, sum by (cgroup) (rate({_RUN_QUEUE}_sum{{HOST}}[$__rate_interval])))", "{{cgroup}}"),
    ),
    row("Errors and kills"),
    graph(
        "OOM kills", "none",
        Help("Processes killed for want of memory, by scope and the victim's cgroup.", "none.",
             f"a point names the victim; more of it: journalctl MESSAGE_ID={MESSAGE_ID}."),
        Query(grown("bpf_oom_kills_total", "HOST", "scope, cgroup"), "{{cgroup}} ({{scope}})"), stack=True,
    ),
    graph(
        "Failed block requests", "none",
        Help("Block requests that completed with an error.", "none, but for notsupp and again, which mean nothing bad.",
             "read the kernel log of that moment: journalctl -k."),
        Query(grown("bpf_block_io_errors_total", "HOST", "device, operation, error"),
              "{{device}} {{operation}}: {{error}}"), stack=True,
    ),
    row("Disk"),
    heatmap(
        "Device time", "s",
        Help("How long devices took for requests, all devices and operations.",
             "a steady band for each kind of device and operation.",
             "the band moved up: the device is slower or busier. A new band: a new kind of request."),
        buckets(_DEVICE),
    ),
    graph(
        "Device time, p99", "s",
        Help("One request in a hundred takes at least this long.", "as it was last week.",
             "one operation alone is slow: writes and flushes point at the device's cache, reads at the device."),
        Query(quantile(0.99, _DEVICE, "HOST", "device, operation"), "{{device}} {{operation}}"),
    ),
    row("Memory and page cache"),
    graph(
        "Hit ratio", "percentunit",
        Help("Share of page accesses that found their page in memory.", "steady; above 90 % on most hosts.",
             "see whether misses grew (something reads more) or accesses fell (less was asked for)."),
        Query(HITS, "hits"),
    ),
    graph(
        "Pages", "short",
        Help("Pages each second that were missing when asked for, were added to the cache (readahead too), or dirtied.",
             "misses far fewer than additions: readahead does its work.",
             "many misses: disk reads follow, compare the row above. Many dirtied pages: writeback comes later."),
        Query("sum(rate(bpf_page_cache_misses_total{HOST}[$__rate_interval]))", "missed"),
        Query("sum(rate(bpf_page_cache_added_total{HOST}[$__rate_interval]))", "added"),
        Query("sum(rate(bpf_page_cache_dirtied_total{HOST}[$__rate_interval]))", "dirtied"),
    ),
    row("Network"),
    graph(
        "Retransmits", "pps",
        Help("TCP segments sent again, by kind.", "a few a second; probes are cheap insurance.",
             "data: loss or overload on the path. syn, synack: handshakes that get no answer."),
        Query("sum by (kind) (rate(bpf_tcp_retransmits_total{HOST}[$__rate_interval]))", "{{kind}}"), stack=True,
    ),
    graph(
        "Connections opened", "cps",
        Help("TCP connections established each second.", "follows the load.",
             "a fall: clients do not get through. A jump: clients retry, or a pool of connections is not used."),
        Query("sum by (direction) (rate(bpf_tcp_connections_opened_total{HOST}[$__rate_interval]))", "{{direction}}"),
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-host", "Host overview", "Which of CPU, disk, memory and network is the trouble on this host?", _PANELS,
    several=False,
)  # fmt: skip
