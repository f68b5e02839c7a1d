# SPDX-License-Identifier: Apache-2.0
"""Loads that the tests of this folder make, and the kernel's own accounts of them. What sets something up undoes it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from daemon import cgroups, libbpf
from daemon.btf import Btf
from daemon.compiler import compile_text

_BLKDISCARD = 0x1277  # include/uapi/linux/fs.h: _IO(0x12, 119)


class DiskStat(NamedTuple):
    """/sys/block/<disk>/stat (Documentation/block/stat.rst): sectors have 512 bytes, ticks are milliseconds."""

    reads: int
    read_merges: int
    read_sectors: int
    read_ticks: int
    writes: int
    write_merges: int
    write_sectors: int
    write_ticks: int
    in_flight: int
    io_ticks: int
    time_in_queue: int
    discards: int
    discard_merges: int
    discard_sectors: int
    discard_ticks: int
    flushes: int
    flush_ticks: int

    def since(self, before: DiskStat) -> DiskStat:
        return DiskStat(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Disk:
    """A loop device of the test's own, on a file."""

    path: Path
    file: Path

    @property
    def name(self) -> str:
        return self.path.name

    def stat(self) -> DiskStat:
        return disk_stat(self.name)

    def read(self, count: int, size: int = 4096, first: int = 0) -> int:
        """Direct reads by this process, one after the other; how many failed with EIO."""
        failed = 0
        with _opened(self.path, os.O_RDONLY | os.O_DIRECT) as disk, mmap.mmap(-1, size) as buffer:
            for number in range(count):
                try:
                    os.preadv(disk, [buffer], first + number * size)
                except OSError:
                    failed += 1
        return failed

    def write(self, count: int, size: int = 4096) -> None:
        """Direct writes by this process."""
        with _opened(self.path, os.O_WRONLY | os.O_DIRECT) as disk, mmap.mmap(-1, size) as buffer:
            for number in range(count):
                os.pwritev(disk, [buffer], number * size)

    def flush(self, count: int) -> None:
        """Empties the write cache: fsync of a block device sends a flush, also when nothing was written."""
        with _opened(self.path, os.O_WRONLY) as disk:
            for _ in range(count):
                os.fsync(disk)

    def discard(self, count: int, size: int = 1 << 16) -> None:
        with _opened(self.path, os.O_WRONLY) as disk:
            for number in range(count):
                fcntl.ioctl(disk, _BLKDISCARD, struct.pack("QQ", number * size, size))


def disk_stat(name: str) -> DiskStat:
    return DiskStat(*map(int, Path(f"/sys/block/{name}/stat").read_text().split()[:17]))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def loop_device(file: Path, size: int = 64 << 20) -> Iterator[Disk]:
    """A loop device on a new file."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)
    made = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    path = Path(made.stdout.strip())
    try:
        yield Disk(path, file)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)
        file.unlink()


_WITNESS = """
BPF_ARRAY(seen, u64, 2);
int completed(unsigned long long *ctx)
{
	struct request *rq = (void *)ctx[0];
#ifdef HAVE_request_rq_disk
	struct gendisk *disk = rq->rq_disk;
#else
	struct request_queue *q = rq->q;
	struct gendisk *disk = q->disk;
#endif
	int which = rq->cmd_flags & 1;
	u64 *count;

	if (disk->major != MAJOR || disk->first_minor != MINOR || (u32)ctx[2] < rq->__data_len)
		return 0;
	if ((rq->cmd_flags & 0xff) == REQ_OP_FLUSH)
		return 0;
	count = seen.lookup(&which);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
"""


@contextmanager
def witness(disk: Disk) -> Iterator[Callable[[], tuple[int, int]]]:
    """Counts completions on a loop device with the smallest of programs: operations that read, that write; no flushes.

    What a test may expect of BPF at all: kernels of sandboxes run no BPF program while a process of the sandbox itself
    is the current one, and a completion that interrupts such a process is then invisible to every program.
    """
    fields = {
        "request": ("q", "rq_disk?", "cmd_flags", "__data_len"), "request_queue": ("disk?",),
        "gendisk": ("major", "first_minor"),
    }  # fmt: skip
    device = disk.path.stat().st_rdev
    flags = [f"-DMAJOR={os.major(device)}", f"-DMINOR={os.minor(device)}"]
    compiled = compile_text(Btf().header(fields, ("req_op.REQ_OP_FLUSH",)).text + _WITNESS, flags)
    target = libbpf.vmlinux_btf_id("block_rq_complete", libbpf.ATTACH_TRACE_RAW_TP)
    program = libbpf.prog_load(
        "witness", libbpf.PROG_TYPE_TRACING, compiled.functions["completed"], libbpf.ATTACH_TRACE_RAW_TP, target
    )
    link = libbpf.raw_tracepoint_open(None, program)

    def read() -> tuple[int, int]:
        raw = [libbpf.map_lookup(compiled.maps["seen"].descriptor, struct.pack("I", which), 8) for which in (0, 1)]
        reads, writes = (struct.unpack("Q", one or bytes(8))[0] for one in raw)
        return reads, writes

    try:
        yield read
    finally:
        os.close(link)
        os.close(program)
