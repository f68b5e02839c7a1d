# SPDX-License-Identifier: Apache-2.0
"""Loads of the page cache with known counts: filesystems of our own, files that are cold on demand, and a witness.

The metrics cover the whole machine. The witness is a tracefs instance that records what others do meanwhile, so that a
measurement with foreign activity in it can be made again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

PAGE = mmap.PAGESIZE
TRACING = Path("/sys/kernel/tracing")
# No journal and no times to write: only the test's own files have pages that change.
MKFS = {"ext4": ("mkfs.ext4", "-q", "-F", "-O", "^has_journal"), "xfs": ("mkfs.xfs", "-q", "-f")}
_MOUNT = {"ext4": "noatime,lazytime", "xfs": "noatime,lazytime", "tmpfs": "size=64m"}
_IMAGE_BYTES = 320 << 20  # sparse; mkfs.xfs wants 300 MiB
_USES = tuple(
    f"filemap/mm_filemap_{what}" for what in ("add_to_page_cache", "get_pages", "fault", "map_pages")
)  # fmt: skip
_DELETES = "filemap/mm_filemap_delete_from_page_cache"
_DIRTIES = "writeback/writeback_dirty_folio"
_ATTEMPTS = 400
_CACHESTAT = 451  # system call on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class Counts(NamedTuple):
    """The four metrics, in pages."""

    accesses: int = 0
    misses: int = 0
    added: int = 0
    dirtied: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def pages(first_byte: int, end_byte: int) -> range:
    """The pages that hold these bytes."""
    return range(first_byte // PAGE, -(-end_byte // PAGE))


class _Range(ctypes.Structure):
    """struct cachestat_range { __u64 off; __u64 len; }"""

    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class File:
    """An open file, and which of its pages are in the page cache."""

    def __init__(self, path: Path, flags: int = os.O_RDWR) -> None:
        self.path = path
        self.descriptor = os.open(path, flags)
        self.size = os.fstat(self.descriptor).st_size
        self.pages = len(pages(0, self.size))

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def chill(self) -> None:
        """Drops its pages; those that another CPU still holds in a batch need a second try."""
        os.fsync(self.descriptor)
        for _ in range(100):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not self.cached():
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.path}: pages stay in the page cache")

    def warm(self) -> None:
        os.pread(self.descriptor, self.size, 0)

    def chunks(self, size: int) -> Iterator[tuple[int, range]]:
        """Where each read of `size` bytes begins, and the pages that it asks for."""
        return ((at, pages(at, min(at + size, self.size))) for at in range(0, self.size, size))

    def cached(self) -> int:
        """How many of its pages hold data in memory (mincore(2))."""
        with self.map(mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
            first = ctypes.c_char.from_buffer(view)
            states = (ctypes.c_ubyte * self.pages)()
            failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(self.size), states)
            del first
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(state & 1 for state in states)

    def missing(self, asked: range) -> int:
        """How many of these pages are not in the page cache, nor on their way into it (cachestat(2), kernel 6.5).

        Counted from the file's start: when the call makes way for another task and its range began inside a folio, it
        overlooks what comes next (xas_pause adds the folio's size to an index that is not its first).
        """
        return len(asked) - (self._present(asked.stop) - self._present(asked.start))

    def absent(self) -> int:
        """`missing` of all its pages."""
        return self.missing(range(self.pages))

    def _present(self, end: int) -> int:
        what = _Range(0, end * PAGE)  # a length of 0 would mean all of it
        result = (ctypes.c_uint64 * 5)()  # struct cachestat: nr_cache comes first
        failed = end and _libc.syscall(_CACHESTAT, self.descriptor, ctypes.byref(what), ctypes.byref(result), 0)
        assert not failed, os.strerror(ctypes.get_errno())
        return result[0]

    def map(self, flags: int, protection: int = mmap.PROT_READ) -> mmap.mmap:
        return mmap.mmap(self.descriptor, self.size, flags=flags, prot=protection)


@dataclass(frozen=True)
class Disk:
    """A mounted filesystem; `device` is major << 20 | minor, as the kernel keeps it, `name` its backing device's."""

    kind: str
    folder: Path
    source: str
    device: int
    name: str

    def again(self) -> None:
        """Mounted anew: nothing of it is in memory."""
        _run("umount", str(self.folder))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-t", self.kind, "-o", _MOUNT[self.kind], self.source, str(self.folder))

    def file(self, name: str, size: int) -> File:
        """A file of random bytes, written back."""
        path = self.folder / name
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
        return File(path)

    def readahead(self, kilobytes: int) -> None:
        """The most that one readahead reads, of files opened from now on."""
        Path(f"/sys/class/bdi/{self.name}/read_ahead_kb").write_text(str(kilobytes))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def disk(kind: str, work: Path) -> Iterator[Disk]:
    """A new ext4 or xfs on a loop device, or a tmpfs, mounted in `work`."""
    folder = work / kind
    folder.mkdir()
    with ExitStack() as undo:
        source = "none"
        if kind in MKFS:
            image = work / f"{kind}.img"
            undo.callback(image.unlink)
            with image.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            _run(*MKFS[kind], str(image))
            # Direct, or the image's own pages would be read and counted too.
            source = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
            undo.callback(_run, "losetup", "--detach", source)
        _run("mount", "-t", kind, "-o", _MOUNT[kind], source, str(folder))
        undo.callback(_run, "umount", "--lazy", str(folder))  # a test that failed may still have files open
        number = folder.stat().st_dev
        major, minor = os.major(number), os.minor(number)
        yield Disk(kind, folder, source, major << 20 | minor, f"{major}:{minor}")


@contextmanager
def witness(own: Disk, blocks: bool = False) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether anybody meddled since it was last asked: used other files, or took pages
    of ours away (memory reclaim, DAMON).

    Inode 1 is ext4's own cache of its free blocks. With `blocks`, the filesystem's use of its block device is nobody
    else's: that file's inode number is the device's.
    """
    foreign = f"(s_dev != {own.device} || i_ino == 1)" + (f" && i_ino != {own.device}" if blocks else "")
    filters = dict.fromkeys(_USES, foreign)
    filters[_DIRTIES] = f'name != "{own.name}"' + ("" if blocks else f" || ino == {own.device}")
    filters[_DELETES] = f"s_dev == {own.device}"
    instance = TRACING / "instances" / f"bpfmetricsd_test_{os.getpid()}"
    instance.mkdir()
    try:
        for event, about in filters.items():
            (instance / "events" / event / "filter").write_text(about)
            (instance / "events" / event / "enable").write_text("1")

        def others() -> bool:
            found = any(not line.startswith("#") for line in (instance / "trace").read_text().splitlines())
            (instance / "trace").write_text("")
            return found

        yield others
    finally:
        for event in filters:
            (instance / "events" / event / "enable").write_text("0")
        instance.rmdir()


def nothing() -> None:
    pass


def ready() -> bool:
    return True


@dataclass(frozen=True)
class Meter:
    """What a load adds to the counts, measured while nobody meddled."""

    counts: Callable[[], Counts]
    others: Callable[[], bool]

    def measure(
        self, load: Callable[[], object], prepare: Callable[[], object] = nothing, ready: Callable[[], bool] = ready
    ) -> Counts:
        """`ready` says whether things still are as `prepare` left them."""
        for attempt in range(_ATTEMPTS):
            prepare()
            self.others()
            if ready():
                before = self.counts()
                load()
                after = self.counts()
                if not self.others():
                    return after.since(before)
            time.sleep(0.001 * (attempt % 50))
        raise AssertionError(f"in {_ATTEMPTS} attempts somebody else always used files or memory; stop what else runs")

    def cold(self, load: Callable[[], object], *files: File) -> Counts:
        """With nothing of these files in the page cache."""
        return self.measure(
            load, lambda: [file.chill() for file in files], lambda: all(file.absent() == file.pages for file in files)
        )

    def warm(self, load: Callable[[], object], *files: File) -> Counts:
        """With all of these files in the page cache."""
        return self.measure(
            load, lambda: [file.warm() for file in files], lambda: not any(file.absent() for file in files)
        )


@contextmanager
def fault_counter(file: File) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many page faults there were since it was last asked, anywhere in this process's
    mapping of the file. (getrusage counts others too: a process that has forked faults at its first writes.)
    """
    instance = TRACING / "instances" / f"bpfmetricsd_test_faults_{os.getpid()}"
    instance.mkdir()
    events = [instance / "events/exceptions" / event for event in ("page_fault_user", "page_fault_kernel")]
    try:
        for event in events:
            (event / "enable").write_text("1")

        def count() -> int:
            found = sum(not line.startswith("#") for line in (instance / "trace").read_text().splitlines())
            mappings = Path("/proc/self/maps").read_text().splitlines()
            addresses = next(line.split()[0] for line in mappings if line.endswith(str(file.path)))
            first, end = (f"{int(address, 16):#x}" for address in addresses.split("-"))
            for event in events:
                (event / "filter").write_text(f"common_pid == {os.getpid()} && address >= {first} && address < {end}")
            (instance / "trace").write_text("")
            return found

        yield count
    finally:
        for event in events:
            (event / "enable").write_text("0")
        instance.rmdir()


def readahead(file: File, size: int) -> None:
    """readahead(2)."""
    failed = _libc.readahead(file.descriptor, ctypes.c_int64(0), ctypes.c_size_t(size))
    assert not failed, os.strerror(ctypes.get_errno())


def major_faults() -> int:
    """Of this thread: those for which something had to be read."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def dirtied() -> int:
    """The kernel's own count of pages that became dirty, with what the CPUs hold back."""
    Path("/proc/sys/vm/stat_refresh").read_text()
    return int(dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())["nr_dirtied"])


class Process:
    """A child that does its load, which gives a number, each time it is told to. It ends with the test."""

    def __init__(self, load: Callable[[], int]) -> None:
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._orders)
            self._serve(load, orders, reports)
        os.close(orders)
        os.close(reports)

    @staticmethod
    def _serve(load: Callable[[], int], orders: int, reports: int) -> NoReturn:
        try:
            while os.read(orders, 1):
                os.write(reports, load().to_bytes(8))
        finally:
            os._exit(0)

    def start(self) -> None:
        os.write(self._orders, b".")

    def wait(self) -> int:
        report = os.read(self._reports, 8)
        assert report, "the process ended"
        return int.from_bytes(report)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        os.close(self._orders)
        os.close(self._reports)
