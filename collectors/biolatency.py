# SPDX-License-Identifier: Apache-2.0
"""Block I/O: queue time, device time, size and errors by disk and operation.

Queue time is from the request's start (as in the kernel's own ticks, `/sys/block/*/stat`) to its last issue to the
driver, device time from there to the completion of its last part.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from collectors.decoders import OTHER, Totals, counts, text
from daemon.declare import Collector, Context, Decoded, Hook, Option, Part, Row, Tables, Truth, Variant
from daemon.histogram import BYTES, SECONDS
from daemon.model import Metric

OPERATIONS = ("read", "write", "flush", "discard", "other")  # enum operation
_LABELS = ("device", "operation")
DISKSTATS = "/proc/diskstats"

# include/linux/blk_types.h: BLK_STS_*. From 14 on a number's meaning depends on the kernel ("block: Remove
# BLK_STS_ZONE_RESOURCE" moved them), and BTF does not know these macros.
_STATUS = {
    1: "notsupp", 2: "timeout", 3: "nospc", 4: "transport", 5: "target", 6: "resv_conflict", 7: "medium",
    8: "protection", 9: "resource", 10: "ioerr", 11: "dm_requeue", 12: "again", 13: "dev_resource",
}  # fmt: skip
# block/blk-core.c: blk_errors[], so that an error has one name on all kernels.
_ERRNO = {
    errno.EOPNOTSUPP: "notsupp", errno.ETIMEDOUT: "timeout", errno.ENOSPC: "nospc", errno.ENOLINK: "transport",
    errno.EREMOTEIO: "target", errno.EBADE: "resv_conflict", errno.ENODATA: "medium", errno.EILSEQ: "protection",
    errno.ENOMEM: "resource", errno.EIO: "ioerr", errno.EREMCHG: "dm_requeue", errno.EAGAIN: "again",
    errno.EBUSY: "dev_resource",
}  # fmt: skip

DURATION = Metric(
    "bpf_block_io_duration_seconds", "histogram",
    "Time a block device took for a request, from its last issue to its completion.",
    _LABELS, "seconds", SECONDS.bounds,
)  # fmt: skip
QUEUE = Metric(
    "bpf_block_io_queue_duration_seconds", "histogram",
    "Time a block request waited before it was issued to the device.",
    _LABELS, "seconds", SECONDS.bounds,
)  # fmt: skip
SIZE = Metric(
    "bpf_block_io_size_bytes", "histogram", "Size of completed block requests.", _LABELS, "bytes", BYTES.bounds
)
ERRORS = Metric("bpf_block_io_errors", "counter", "Block requests that completed with an error.", (*_LABELS, "error"))


def error_name(error: int) -> str:
    """blk_status_t, or a negative errno as kernels before 5.17 pass it (those without blk_status_t here)."""
    if error < 0:
        return _ERRNO.get(-error) or errno.errorcode.get(-error, str(error)).lower()
    return _STATUS.get(error, f"status_{error}")


def _sector(words: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return (("sector", str(words[0])),)


def decode(tables: Tables, context: Context) -> Decoded:
    limit = context.max_series
    duration, queue, size, errors = (Totals(metric, limit) for metric in (DURATION, QUEUE, SIZE, ERRORS))
    rows = [*tables["block_io"], *_others(tables["block_io_other"])]
    for row in rows:
        labels = (text(row.key["disk"]), OPERATIONS[row.key["operation"]])
        duration.add(labels, counts(row.value, "device", SECONDS, context, _sector))
        queue.add(labels, counts(row.value, "queue", SECONDS, context, _sector))
        size.add(labels, counts(row.value, "size", BYTES, context, _sector))
    for row in tables["block_io_errors"]:
        key = row.key
        errors.add((text(key["disk"]), OPERATIONS[key["operation"]], error_name(key["error"])), row.value)
    families = [totals.family(context.created) for totals in (duration, queue, size, errors)]
    return Decoded(families, duration.dropped + errors.dropped)


def _completed(diskstats: str) -> dict[str, int]:
    """/proc/diskstats (Documentation/admin-guide/iostats.rst): reads, writes, discards and flushes by disk."""
    fields = [line.split() for line in diskstats.splitlines()]
    return {one[2]: sum(int(one[3 + i]) for i in (0, 4, 11, 15) if 3 + i < len(one)) for one in fields}


def _counted(began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> tuple[int, int]:
    """Of the disks that we know.

    The kernel does not count passthrough requests, and counts as a write each empty request that asks for a flush.
    """
    ours: dict[str, int] = {}
    for row in tables["block_io"]:
        if OPERATIONS[row.key["operation"]] != OTHER:
            disk, device = text(row.key["disk"]), row.value["device"]
            ours[disk] = ours.get(disk, 0) + sum(device["slots"]) + device["overflow"]
    before, after = _completed(began[DISKSTATS]), _completed(now[DISKSTATS])
    present = [disk for disk in ours if after.get(disk, 0) >= before.get(disk, 0)]
    kernels = sum(after.get(disk, 0) - before.get(disk, 0) for disk in present)
    return sum(ours[disk] for disk in present) + sum(row.value for row in tables["flush_askers"]), kernels


def _others(rows: Sequence[Row]) -> list[Row]:
    """What found no place in the kernel's table; not exported before something is in it."""
    return [
        Row({"disk": OTHER.encode(), "operation": row.key}, row.value)
        for row in rows
        if row.value["device"]["sum"] or any(row.value["device"]["slots"])
    ]


def _defines(options: Mapping[str, Any]) -> dict[str, int]:
    return {"MAX_DEVICES": options["max_devices"], "MAX_INFLIGHT": options["max_inflight"]}


COLLECTOR = Collector(
    name="biolatency",
    summary="block I/O queue time, device time, size and errors by disk and operation",
    parts=tuple(
        Part(target, tuple(Variant({target: Hook(kind, target)}) for kind in ("tp_btf", "raw_tp")))
        for target in ("block_rq_issue", "block_rq_complete")
    ),
    structs={
        "request": ("q", "rq_disk?", "bio", "cmd_flags", "rq_flags", "__data_len", "__sector", "start_time_ns"),
        "request_queue": ("disk?",),
        "gendisk": ("disk_name",),
        "bio": ("bi_blkg?",),
        "blkcg_gq": ("blkcg?",),
        "blkcg": ("css?",),
        "cgroup_subsys_state": ("cgroup",),
        "cgroup": ("kn", "root"),
        "cgroup_root": ("hierarchy_id",),
        "kernfs_node": ("id",),
    },
    constants=(
        "req_op|req_opf.REQ_OP_FLUSH",
        "req_op|req_opf.REQ_OP_DISCARD",
        "req_op|req_opf.REQ_OP_DRV_IN",
        "req_op|req_opf.REQ_OP_DRV_OUT",
        "rqf_flags.__RQF_IO_STAT?",
    ),
    options=(
        Option("max_devices", "int", 64, "disks that get series of their own", minimum=1, maximum=1024),
        Option("max_inflight", "int", 16384, "requests that may be under way at once", minimum=256, maximum=1 << 20),
    ),
    metrics=lambda options: (DURATION, QUEUE, SIZE, ERRORS),
    defines=_defines,
    tables=("block_io", "block_io_other", "block_io_errors", "flush_askers"),
    decode=decode,
    truth=Truth((DISKSTATS,), _counted),
)
