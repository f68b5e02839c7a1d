# SPDX-License-Identifier: Apache-2.0
"""Block I/O: requests by device and operation, where their time goes, their sizes and errors."""

from __future__ import annotations

from grafana.parts import Help, Query, board, buckets, graph, grown, heatmap, quantile, variable

_DEVICE = "bpf_block_io_duration_seconds"
_QUEUE = "bpf_block_io_queue_duration_seconds"
_SIZE = "bpf_block_io_size_bytes"

_PANELS = (
    graph(
        "Requests", "iops",
        Help("Completed requests each second.", "follows the load.",
             "fewer requests and more time each: the device. More requests: find their cause in the exemplars."),
        Query(f"sum by (device, operation) (rate({_DEVICE}_count{{DISK}}[$__rate_interval]))",
              "{{device}} {{operation}}"), stack=True,
    ),
    graph(
        "Throughput", "Bps",
        Help("Bytes read, written and discarded each second.", "below what the device is made for.",
             "a flat top is a limit of the device, the bus or a cloud volume's plan."),
        Query(f"sum by (device, operation) (rate({_SIZE}_sum{{DISK}}[$__rate_interval]))", "{{device}} {{operation}}"),
        stack=True,
    ),
    heatmap(
        "Device time", "s",
        Help("From a request's last issue to the driver until its last part completed.",
             "NVMe below 1 ms, other SSDs below 10 ms, rotating and network disks below 50 ms.",
             "choose one device and compare with last week. The points name the process and the sector."),
        buckets(_DEVICE, "DISK"),
    ),
    heatmap(
        "Queue time", "s",
        Help("From a request's start to its last issue to the driver.", "far below the device time.",
             "requests wait for their turn: more are sent than the device takes, or an I/O scheduler holds them."),
        buckets(_QUEUE, "DISK"),
    ),
    graph(
        "Device time by device, p50 and p99", "s",
        Help("Half of the requests, and all but one in a hundred, take at most this long.",
             "p99 within ten times p50.", "p99 alone: some requests meet a busy moment. Both: the device is slow."),
        Query(quantile(0.5, _DEVICE, "DISK", "device"), "{{device}} p50"),
        Query(quantile(0.99, _DEVICE, "DISK", "device"), "{{device}} p99"),
    ),
    graph(
        "Device time by operation, p99", "s",
        Help("All but one request in a hundred take at most this long.", "flushes take longest, then writes or reads.",
             "slow flushes hold up whoever calls fsync: databases first."),
        Query(quantile(0.99, _DEVICE, "DISK", "operation"), "{{operation}}"),
    ),
    graph(
        "Requests under way", "short",
        Help("Requests queued and with the device, on average: the seconds they took in each second.",
             "queued near zero; with the device up to its queue depth.",
             "many queued: the device is saturated. Many with it and few complete: it hangs."),
        Query(f"sum by (device) (rate({_QUEUE}_sum{{DISK}}[$__rate_interval]))", "{{device}} queued"),
        Query(f"sum by (device) (rate({_DEVICE}_sum{{DISK}}[$__rate_interval]))", "{{device}} with the device"),
    ),
    graph(
        "Queue time by device, p99", "s",
        Help("All but one request in a hundred wait at most this long before they are issued.", "below 1 ms.",
             "lower the load or its parallelism, or spread it over more devices."),
        Query(quantile(0.99, _QUEUE, "DISK", "device"), "{{device}}"),
    ),
    heatmap(
        "Request size", "bytes",
        Help("Sizes of completed requests.", "4 KiB for databases, up to 1 MiB for streams.",
             "small ones where large ones were expected: writes are synced too often, or readahead is off."),
        buckets(_SIZE, "DISK"),
    ),
    graph(
        "Failed requests", "none",
        Help("Requests that completed with an error.", "none, but for notsupp and again, which mean nothing bad.",
             "medium, ioerr, target: replace the disk. timeout, transport: cable, controller, network. nospc: the pool"
             " below is full. Then read the kernel log: journalctl -k."),
        Query(grown("bpf_block_io_errors_total", "DISK", "device, operation, error"),
              "{{device}} {{operation}}: {{error}}"), stack=True,
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-block-io", "Block I/O", "Where block requests spend their time. Quantiles come from power-of-two buckets.",
    _PANELS,
    variable("device", f"{_DEVICE}_count{{HOST}}"),
)  # fmt: skip
