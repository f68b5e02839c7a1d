# SPDX-License-Identifier: Apache-2.0
"""Loads of the page cache with known counts: filesystems of our own, files that are cold on demand, and a witness.

The metrics cover the whole machine. The witness is a tracefs instance that records what anybody does to files of
other filesystems than the one under test, so that a measurement with foreign activity in it can be made again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PAGE = mmap.PAGESIZE
TRACING = Path("/sys/kernel/tracing")
_ATTEMPTS = 400
_IMAGE_BYTES = 320 << 20  # sparse; mkfs.xfs wants 300 MiB
# No journal and no times to write: only the test's own files have pages that change.
_MKFS = {"ext4": ("mkfs.ext4", "-q", "-F", "-O", "^has_journal"), "xfs": ("mkfs.xfs", "-q", "-f")}
_OPTIONS = {"ext4": "noatime,lazytime", "xfs": "noatime,lazytime", "tmpfs": "size=64m"}
_EVENTS = (
    "filemap/mm_filemap_add_to_page_cache", "filemap/mm_filemap_get_pages", "filemap/mm_filemap_fault",
    "filemap/mm_filemap_map_pages", "writeback/writeback_dirty_folio",
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Counts(NamedTuple):
    """The four metrics, in pages."""

    accesses: int = 0
    misses: int = 0
    added: int = 0
    dirtied: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Disk:
    """A mounted filesystem; `device` is major << 20 | minor, as the kernel keeps it, `name` its backing device's."""

    kind: str
    folder: Path
    device: int
    name: str

    def readahead(self, kilobytes: int) -> None:
        """The most that one readahead reads."""
        Path(f"/sys/class/bdi/{self.name}/read_ahead_kb").write_text(str(kilobytes))

    def file(self, name: str, size: int) -> File:
        """A file of random bytes, written back."""
        path = self.folder / name
        path.write_bytes(os.urandom(size))
        file = File(path)
        os.fsync(file.descriptor)
        return file


class File:
    """An open file, and which of its pages are in the page cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.descriptor).st_size
        self.pages = -(-self.size // PAGE)

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chill(self) -> None:
        """Drops its pages; those that other CPUs still hold in their batches need more than one try."""
        os.fsync(self.descriptor)
        for _ in range(100):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not self.cached():
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.path}: pages stay in the page cache")

    def warm(self) -> None:
        while os.pread(self.descriptor, 1 << 20, 0) and self.cached() < self.pages:
            self.read(1 << 20)

    def read(self, chunk: int) -> None:
        """All of it from the start, `chunk` bytes at a time, by read(2)."""
        buffer = memoryview(bytearray(chunk))
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        while os.readv(self.descriptor, [buffer]):
            pass

    def accesses(self, chunk: int) -> int:
        """How many pages `read(chunk)` asks for: those of each call."""
        ends = ((start, min(start + chunk, self.size)) for start in range(0, self.size, chunk))
        return sum((end - 1) // PAGE - start // PAGE + 1 for start, end in ends)

    def cached(self) -> int:
        """mincore(2)."""
        with mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
            first = ctypes.c_char.from_buffer(view)
            states = (ctypes.c_ubyte * self.pages)()
            failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(self.size), states)
            del first
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(state & 1 for state in states)


def mkfs(kind: str) -> str:
    """The program that makes such a filesystem; empty for tmpfs."""
    return _MKFS[kind][0] if kind in _MKFS else ""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def disk(kind: str, work: Path) -> Iterator[Disk]:
    """A new ext4 or xfs on a loop device, or a tmpfs, mounted in `work`."""
    folder = work / kind
    folder.mkdir()
    with ExitStack() as undo:
        source = "none"
        if kind != "tmpfs":
            image = work / f"{kind}.img"
            undo.callback(image.unlink)
            with image.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            _run(*_MKFS[kind], str(image))
            # Direct, or the image's own pages would be read and counted too.
            source = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
            undo.callback(_run, "losetup", "--detach", source)
        _run("mount", "-t", kind, "-o", _OPTIONS[kind], source, str(folder))
        undo.callback(_run, "umount", str(folder))
        number = folder.stat().st_dev
        major, minor = os.major(number), os.minor(number)
        yield Disk(kind, folder, major << 20 | minor, f"{major}:{minor}")


@contextmanager
def witness(own: Disk) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether anybody used other files since it was last asked."""
    instance = TRACING / "instances" / f"bpfmetricsd_test_{os.getpid()}"
    instance.mkdir()
    try:
        for event in _EVENTS:
            about = f'name != "{own.name}"' if event.startswith("writeback") else f"s_dev != {own.device}"
            (instance / "events" / event / "filter").write_text(about)
            (instance / "events" / event / "enable").write_text("1")

        def others() -> bool:
            found = any(not line.startswith("#") for line in (instance / "trace").read_text().splitlines())
            (instance / "trace").write_text("")
            return found

        yield others
    finally:
        for event in _EVENTS:
            (instance / "events" / event / "enable").write_text("0")
        instance.rmdir()


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Meter:
    """What a load adds to the counts, measured while nobody else used a file."""

    counts: Callable[[], Counts]
    others: Callable[[], bool]

    def measure(self, load: Callable[[], object], prepare: Callable[[], object] = nothing) -> Counts:
        for attempt in range(_ATTEMPTS):
            prepare()
            self.others()
            before = self.counts()
            load()
            after = self.counts()
            if not self.others():
                return after.since(before)
            time.sleep(0.001 * (attempt % 50))
        raise AssertionError(f"in {_ATTEMPTS} attempts there was always somebody else who used files; stop what else runs")
