# SPDX-License-Identifier: Apache-2.0
"""Loads that the tests of this folder make, and the kernel's own accounts of them. Each undoes what it set up."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from daemon import cgroups

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
    """A loop device on a new file, full of data, so that reads have something to read."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)
    made = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    path = Path(made.stdout.strip())
    try:
        yield Disk(path, file)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)
        file.unlink()
