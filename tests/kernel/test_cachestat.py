# SPDX-License-Identifier: Apache-2.0
"""cachestat against arithmetic, mincore(2), cachestat(2), getrusage(2), /proc/vmstat and events of the kernel's own.

Counts are exact, with each of the ways to read and fault that this kernel has hooks for.
"""

from __future__ import annotations

import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.accuracy import compared
from tests.kernel.files import (
    MKFS,
    PAGE,
    TRACING,
    CannotMountError,
    CannotWatchError,
    Counts,
    Disk,
    File,
    Meter,
    Process,
    dirtied,
    disk,
    fault_counter,
    has_large_folios,
    has_tracepoints,
    huge_mappings,
    keeps_kprobes,
    major_faults,
    overlay,
    pages,
    readahead,
    witness,
)

pytestmark = pytest.mark.kernel
KIB, MIB = 1 << 10, 1 << 20
READ_ONLY, READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
SINK = os.open("/dev/null", os.O_WRONLY)
Start = Callable[..., tuple[Disk, Meter]]
Read = Callable[[File, int, int], None]
FORBIDDEN = ("", "tp_btf", "tp_btf,fentry,fexit")
_seen: dict[str, str] = {}  # hooks, and what was forbidden when they were first got


@pytest.fixture
def start(shared: Callable[..., Any], lacks: Callable[[str], NoReturn], tmp_path: Path) -> Iterator[Start]:
    """`start("xfs")`: a filesystem, and a meter of what is done to it."""
    with ExitStack() as undo:

        def do(kind: str, forbid: str = "", blocks: bool = False) -> tuple[Disk, Meter]:
            if not TRACING.is_dir():
                lacks(f"{TRACING} is not mounted; mount -t tracefs tracefs {TRACING}")
            if kind in MKFS and not shutil.which(MKFS[kind][0]):
                lacks(f"{MKFS[kind][0]} is not installed; apt install {'xfsprogs' if kind == 'xfs' else 'e2fsprogs'}")
            if forbid == FORBIDDEN[-1] and not has_tracepoints() and not keeps_kprobes():
                with pytest.raises(AssertionError, match=r"kretprobe:filemap_read: this kernel has no bpf_perf_link\."):
                    shared("cachestat", forbid=forbid)
                lacks("this kernel has neither tracepoints where the page cache is read nor kprobes that can be pinned")
            loaded = shared("cachestat", forbid=forbid)
            first = _seen.setdefault(loaded.outcome.detail, forbid)
            if first != forbid:
                lacks(f"this kernel gives the same hooks without {forbid} as without {first or 'nothing'}")

            def counts() -> Counts:
                families = loaded.read()
                return Counts(*(families[f"bpf_page_cache_{name}"].series[0].value for name in Counts._fields))

            own = undo.enter_context(disk(kind, tmp_path))
            # A read of a single page shows how this kernel tells a range's end; any program that starts does one.
            with own.file("first", PAGE) as file:
                os.pread(file.descriptor, PAGE, 0)
            try:
                others = undo.enter_context(witness(own, blocks))
            except CannotWatchError as error:
                lacks(str(error))
            return own, Meter(counts, others, partial(compared, loaded))

        yield do


def _pread(file: File, size: int, at: int) -> None:
    os.pread(file.descriptor, size, at)


def _preadv(file: File, size: int, at: int) -> None:
    os.preadv(file.descriptor, [bytearray(size // 3), bytearray(size - size // 3)], at)


def _read(file: File, size: int, at: int) -> None:
    if at == 0:
        os.lseek(file.descriptor, 0, os.SEEK_SET)
    os.read(file.descriptor, size)


def _readv(file: File, size: int, at: int) -> None:
    if at == 0:
        os.lseek(file.descriptor, 0, os.SEEK_SET)
    os.readv(file.descriptor, [bytearray(size // 3), bytearray(size - size // 3)])


def _sendfile(file: File, size: int, at: int) -> None:
    os.sendfile(SINK, file.descriptor, at, size)


def _sendfile_on(file: File, size: int, at: int) -> None:
    if at == 0:
        os.lseek(file.descriptor, 0, os.SEEK_SET)
    os.sendfile(SINK, file.descriptor, None, size)


def _whole(file: File, chunk: int, read: Read) -> int:
    """Reads a file, `chunk` bytes at a time; how many pages were missing when they were asked for."""
    missing = 0
    for at, asked in file.chunks(chunk):
        missing += file.missing(asked)
        read(file, chunk, at)
    return missing


def _cold_and_warm(meter: Meter, file: File, chunk: int, read: Read) -> list[str]:
    """What is wrong with a cold and a warm reading."""
    asked = sum(len(one) for _, one in file.chunks(chunk))
    missing = cached = behind = 0

    def whole() -> None:
        nonlocal missing, cached, behind
        before = file.behind()
        missing = _whole(file, chunk, read)
        cached, behind = file.cached(), file.behind() - before

    wrong = []
    for state, measure in (("cold", meter.cold), ("warm", meter.warm)):
        found = measure(whole, file)
        wanted = Counts(asked, missing, behind + (file.pages if state == "cold" else 0))
        assert cached == file.pages
        assert (missing > 0) == (state == "cold")
        meter.compared(found, wanted)
        if found != wanted:
            wrong.append(f"{file.path.name} {read.__name__} {chunk} {state}: {found}, not {wanted}")
    return wrong


@pytest.mark.parametrize("forbid", FORBIDDEN)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_reads_in_chunks(start: Start, kind: str, forbid: str) -> None:
    """Every way to read and odd sizes: also reads that overtake readahead, of which some rounds have no event."""
    own, meter = start(kind, forbid)
    wrong: list[str] = []
    own.readahead(128)
    with own.file("even", MIB) as even, own.file("odd", MIB + 1234) as odd:
        for chunk in (PAGE, 5000, 100_000, 128 * KIB, 900_000, MIB):
            wrong += _cold_and_warm(meter, even, chunk, _pread) + _cold_and_warm(meter, odd, chunk, _pread)
        for read in (_preadv, _read, _readv):
            for chunk in (5000, 900_000):
                wrong += _cold_and_warm(meter, odd, chunk, read)
        for read in (_sendfile, _sendfile_on):
            for chunk in (PAGE, 64 * KIB):
                wrong += _cold_and_warm(meter, odd, chunk, read)
    assert wrong == []


@pytest.mark.parametrize("forbid", FORBIDDEN)
def test_reads_through_overlayfs(start: Start, lacks: Callable[[str], NoReturn], forbid: str) -> None:
    """Containers read so: the cache is that of the file below, whose position the reader's own file tells."""
    own, meter = start("xfs", forbid)
    own.readahead(128)
    with own.file("odd", MIB + 1234) as odd, ExitStack() as undo:
        try:
            upper = undo.enter_context(overlay(own))
        except CannotMountError as error:
            lacks(str(error))
        with File(upper / "odd", os.O_RDONLY) as opened:
            wrong = []
            for chunk in (5000, 100_000, 900_000):
                for read in (_pread, _read):
                    through = lambda _, size, at, read=read: read(opened, size, at)  # noqa: E731
                    wrong += [f"{read.__name__} {one}" for one in _cold_and_warm(meter, odd, chunk, through)]
        assert wrong == []


@pytest.mark.parametrize(("kind", "forbid"), [("ext4", ""), *(("xfs", forbid) for forbid in FORBIDDEN)])
def test_single_reads(start: Start, kind: str, forbid: str) -> None:
    own, meter = start(kind, forbid)
    with own.file("file", MIB) as file, own.file("short", 10_000) as short:

        def read(size: int, *places: int) -> Callable[[], None]:
            def load() -> None:
                for place in places:
                    os.pread(file.descriptor, size, place * PAGE)

            return load

        assert meter.cold(read(MIB, 0), file) == Counts(256, 256, 256)
        warm = {
            "once more": (read(MIB, 0), 256),
            "a range twice, then one that begins later": (read(10 * PAGE, 0, 0, 5), 30),
            "another start, the same end": (lambda: (read(10 * PAGE, 20)(), read(5 * PAGE, 25)()), 15),
            "a byte": (read(1, 3, 200, 3), 3),
            "over the end": (read(8 * PAGE, 255), 1),
            "at the end, and behind it": (read(PAGE, 256, 300), 0),
        }
        behind = 0

        def watched(load: Callable[[], object]) -> None:
            nonlocal behind
            before = file.behind()
            load()
            behind = file.behind() - before

        for what, (load, asked) in warm.items():
            assert meter.warm(lambda load=load: watched(load), file) == Counts(asked, 0, behind), what
        assert meter.cold(lambda: os.pread(short.descriptor, MIB, 0), short) == Counts(3, 3, 3)
        assert meter.warm(lambda: os.pread(short.descriptor, 100, 4090), short) == Counts(2)


@pytest.mark.parametrize("forbid", FORBIDDEN)
def test_one_sendfile(start: Start, forbid: str) -> None:
    """It asks for one pipe full after the other."""
    own, meter = start("ext4", forbid)
    with own.file("file", 3 * MIB) as file:
        found = meter.cold(lambda: _sendfile(file, 3 * MIB, 0), file)
        assert (found.accesses, found.added) == (768, 768)
        assert meter.warm(lambda: _sendfile(file, 3 * MIB, 0), file) == Counts(768)
        for at, size in ((5000, 100_000), (1, 3 * MIB - 2)):
            asked = len(pages(at, at + size))
            send = lambda at=at, size=size: _sendfile(file, size, at)  # noqa: E731
            assert meter.cold(send, file).accesses == asked
            assert meter.warm(send, file) == Counts(asked)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_hole_is_read_into_the_cache(start: Start, kind: str) -> None:
    own, meter = start(kind)
    with own.hole("sparse", 64 * PAGE) as file:
        behind = 0

        def read() -> None:
            nonlocal behind
            os.pread(file.descriptor, MIB, 0)
            behind = file.behind()

        assert meter.cold(read, file) == Counts(64, 64, 64 + behind)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_direct_reads_pass_the_cache_by(start: Start, kind: str) -> None:
    own, meter = start(kind)
    flags = os.O_RDONLY | os.O_DIRECT
    with own.file("file", MIB) as file, File(file.path, flags) as direct, mmap.mmap(-1, MIB) as buffer:
        assert meter.cold(lambda: os.preadv(direct.descriptor, [buffer], 0), file) == Counts()


@pytest.mark.parametrize(("kind", "forbid"), [("ext4", ""), *(("xfs", forbid) for forbid in FORBIDDEN)])
def test_what_was_asked_for_ahead_is_no_miss(start: Start, kind: str, forbid: str) -> None:
    """fadvise, readahead(2) and madvise add pages; the read that comes next finds them, be they still on their way."""
    own, meter = start(kind, forbid)
    with own.file("file", MIB) as file, file.map(mmap.MAP_SHARED) as view:
        ahead = {
            "fadvise": lambda: os.posix_fadvise(file.descriptor, 0, MIB, os.POSIX_FADV_WILLNEED),
            "readahead": lambda: readahead(file, MIB),
            "madvise": lambda: view.madvise(mmap.MADV_WILLNEED),
        }
        for how, ask in ahead.items():
            found = meter.cold(lambda ask=ask: (ask(), os.pread(file.descriptor, MIB, 0)), file)
            assert found == Counts(256, 0, 256), how


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_partly_cached_range(start: Start, kind: str) -> None:
    """Islands in the cache: one request adds many runs of pages, some behind its end."""
    own, meter = start(kind)
    with own.file("file", MIB) as file:

        def islands() -> None:
            file.chill()
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for place in range(10, 250, 7):
                os.pread(file.descriptor, 1, place * PAGE)
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_NORMAL)

        for asked in (9, 10, 11, 100, 200, 256):
            missing = asked - len(range(10, min(asked, 250), 7))
            absent = 0

            def read(asked: int = asked) -> None:
                nonlocal absent
                os.pread(file.descriptor, asked * PAGE, 0)
                absent = file.absent()

            found = meter.measure(read, islands, lambda: file.absent() == file.pages - 35)
            assert found == Counts(asked, missing, file.pages - absent - 35)


@pytest.mark.parametrize("forbid", FORBIDDEN)
def test_blocks_of_the_filesystem_between(start: Start, forbid: str) -> None:
    """To find a fragmented file's data, ext4 reads blocks of its own, between adding the pages and reading them."""
    own, meter = start("ext4", forbid, blocks=True)
    count = 800
    with File(own.folder / "first") as file:
        os.truncate(file.path, count * PAGE)
        for place in range(0, count, 2):
            os.pwrite(file.descriptor, b"x", place * PAGE)

    def mount() -> None:
        own.again()
        (own.folder / "first").stat()

    def read() -> None:
        with File(own.folder / "first", os.O_RDONLY) as file:
            os.pread(file.descriptor, count * PAGE, 0)

    found = meter.measure(read, mount)
    assert (found.accesses, found.misses, found.dirtied) == (count, count, 0)
    assert found.added > count, "the blocks are pages of the cache too"


@pytest.mark.parametrize(("kind", "forbid"), [("ext4", ""), *(("xfs", forbid) for forbid in FORBIDDEN)])
def test_faults_on_mapped_files(start: Start, kind: str, forbid: str) -> None:
    """A fault is an access; a miss where the page had to be read. The kernel does not see touches of mapped pages."""
    own, meter = start(kind, forbid)
    with own.file("file", MIB) as file, ExitStack() as undo:  # less than a huge page
        view = undo.enter_context(file.map(mmap.MAP_SHARED))
        count = undo.enter_context(fault_counter(file))
        ones = b"x" * file.pages

        def check(flags: int, random: bool, write: bool, cold: bool) -> None:
            taken = majors = 0
            resident = 0 if cold else file.pages

            def prepare() -> None:
                nonlocal view
                view.close()
                (file.chill if cold else file.warm)()
                os.fsync(file.descriptor)
                view = undo.enter_context(file.map(flags, READ_WRITE if write else READ_ONLY))
                if random:
                    view.madvise(mmap.MADV_RANDOM)
                count()

            def touch() -> None:
                nonlocal taken, majors
                before = major_faults()
                if write:
                    view[::PAGE] = ones
                else:
                    zlib.crc32(view)  # from end to end
                taken, majors = count(), major_faults() - before

            found = meter.measure(touch, prepare, lambda: file.pages - file.absent() == resident)
            case = f"{flags=} {random=} {write=} {cold=} {found=} {majors=}"
            assert found.accesses == taken, case
            assert found.added == file.pages - resident, case
            assert found.dirtied == (file.pages if write and flags == mmap.MAP_SHARED else 0), case
            if not cold:
                assert found.misses == 0, case
            elif random:
                assert found.misses == taken == majors == file.pages, case
            else:
                assert found.misses == 1, f"{case}: readahead brought the rest"

        for flags, random, write, cold in product((mmap.MAP_SHARED, mmap.MAP_PRIVATE), *3 * ((True, False),)):
            check(flags, random, write, cold)


@pytest.mark.parametrize("forbid", FORBIDDEN)
def test_faults_that_map_a_huge_page(
    start: Start, shared: Callable[..., Any], forbid: str, lacks: Callable[[str], NoReturn]
) -> None:
    """Functions see each of them. The tracepoint does not, which the collector says."""
    own, meter = start("xfs", forbid)
    loaded = shared("cachestat", forbid=forbid)
    status = loaded.engine.status()["collectors"]["cachestat"]["programs"]
    exact = {one["fidelity"] for one in status.values() if "mm_filemap_map_pages" in one["hook"]} <= {"exact"}
    with own.file("file", 8 * MIB) as file, ExitStack() as undo:
        file.chill()
        with file.map(mmap.MAP_SHARED, READ_ONLY) as view:
            view.madvise(mmap.MADV_HUGEPAGE)
            zlib.crc32(view)
        view = undo.enter_context(file.map(mmap.MAP_SHARED, READ_ONLY))
        count = undo.enter_context(fault_counter(file))
        taken = huge = 0

        def prepare() -> None:
            nonlocal view, huge
            view.close()
            view = undo.enter_context(file.map(mmap.MAP_SHARED, READ_ONLY))
            count()
            huge = -huge_mappings()

        def touch() -> None:
            nonlocal taken, huge
            zlib.crc32(view)
            taken, huge = count(), huge + huge_mappings()

        found = meter.measure(touch, prepare)
        if not huge:
            lacks("this kernel maps no huge pages of this file")
        compared(loaded, "faults that map huge pages", found.accesses, taken)
        assert found.accesses == taken if exact else found.accesses < taken
        assert (found.misses, found.added) == (0, 0)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_buffered_writes(start: Start, kind: str) -> None:
    """Writes are no accesses. The kernel dirties folios: one byte may make many pages dirty, also in /proc/vmstat."""
    own, meter = start(kind)
    counted = touched = 0
    with own.file("file", 4 * MIB) as file:

        def write(size: int, *places: int) -> Callable[[], None]:
            def load() -> None:
                nonlocal counted, touched
                before = dirtied()
                for place in places:
                    os.pwrite(file.descriptor, b"x" * size, place)
                counted = dirtied() - before
                folios = set().union(*(file.folios.around(pages(place, place + size)) for place in places))
                touched = sum(len(folio) for folio in folios)

            return load

        assert meter.cold(write(10 * PAGE, 0, 0, 5 * PAGE), file) == Counts(added=15, dirtied=15)
        assert counted == 15
        ten = write(10 * PAGE, 0)
        assert meter.measure(ten, ten) == Counts(), "dirty already"
        read = lambda: os.pread(file.descriptor, 10 * PAGE, 0)  # noqa: E731
        assert meter.measure(read, lambda: (file.chill(), ten())) == Counts(10), "written and found"
        assert meter.measure(ten, lambda: (ten(), os.fsync(file.descriptor))) == Counts(dirtied=counted)
        assert meter.cold(write(1, 100, 20 * PAGE), file) == Counts(added=2, dirtied=2), "a part of a page"

        def large() -> None:
            file.chill()
            _whole(file, PAGE, _pread)

        found = meter.measure(write(1, MIB, 2 * MIB, 3 * MIB), large)
        assert found == Counts(dirtied=counted)
        assert counted == touched
        if kind == "xfs" and has_large_folios():
            assert counted > 3, "readahead made large folios"
        assert meter.cold(write(MIB, 0, MIB), file) == Counts(added=512, dirtied=counted)
        assert counted == 512


@pytest.mark.parametrize("forbid", FORBIDDEN)
def test_tmpfs_is_no_cache(start: Start, forbid: str) -> None:
    """Its files are in memory for good: nothing of theirs is counted, as the kernel counts nothing dirty."""
    own, meter = start("tmpfs", forbid)
    with own.file("file", MIB) as file, ExitStack() as undo:
        view = undo.enter_context(file.map(mmap.MAP_SHARED, READ_WRITE))

        def fresh() -> None:
            nonlocal view
            view.close()
            view = undo.enter_context(file.map(mmap.MAP_SHARED, READ_WRITE))

        def touch() -> None:
            view[::PAGE]
            view[::PAGE] = b"x" * file.pages

        assert meter.measure(file.warm) == Counts()
        assert meter.measure(lambda: os.pwrite(file.descriptor, b"x" * MIB, 0)) == Counts()
        assert meter.measure(touch, fresh) == Counts()


def test_concurrent_readers(start: Start) -> None:
    """Two processes read two cold files at the same time, and both warm files at the same time."""
    own, meter = start("xfs")
    with (
        own.file("one", MIB + 5) as one,
        own.file("two", MIB) as two,
        Process(lambda: _whole(one, 5000, _pread)) as left,
        Process(lambda: _whole(two, 100_000, _read)) as right,
    ):
        missing = behind = 0

        def both() -> None:
            nonlocal missing, behind
            before = one.behind() + two.behind()
            left.start()
            right.start()
            missing = left.wait() + right.wait()
            behind = one.behind() + two.behind() - before

        asked = sum(len(part) for file, size in ((one, 5000), (two, 100_000)) for _, part in file.chunks(size))
        cold = meter.cold(both, one, two)
        assert cold == Counts(asked, missing, one.pages + two.pages + behind)
        assert meter.warm(both, one, two) == Counts(asked, 0, behind)


def test_readers_of_one_file(start: Start) -> None:
    """Two processes read the same cold file: what one adds, the other finds."""
    own, meter = start("ext4")
    with own.file("file", 4 * MIB) as file:

        def read() -> int:
            for at in range(0, file.size, 64 * KIB):
                os.pread(file.descriptor, 64 * KIB, at)
            return 0

        with Process(read) as left, Process(read) as right:
            found = meter.cold(lambda: (left.start(), right.start(), left.wait(), right.wait()), file)
    assert found.accesses == 2 * file.pages
    assert found.added == file.pages
    assert 16 <= found.misses <= file.pages, "at least the first range was missing"
