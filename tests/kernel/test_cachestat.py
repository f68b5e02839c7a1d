# SPDX-License-Identifier: Apache-2.0
"""cachestat against arithmetic, mincore(2), cachestat(2), getrusage(2) and /proc/vmstat. Counts are exact."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.kernel.files import (
    MKFS, PAGE, TRACING, Counts, Disk, File, Meter, Process, dirtied, disk, faults, witness,
)  # fmt: skip

pytestmark = pytest.mark.kernel
KIB, MIB = 1 << 10, 1 << 20
CHUNKS = (PAGE, 5000, 100_000, 128 * KIB, 1_000_000, MIB)
READ_ONLY, READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
Start = Callable[..., tuple[Disk, Meter]]


@pytest.fixture
def start(load: Callable[..., Any], lacks: Callable[[str], NoReturn], tmp_path: Path) -> Iterator[Start]:
    """`start("xfs")`: a filesystem, and a meter of what is done to it."""
    with ExitStack() as undo:

        def do(kind: str, forbid: str = "") -> tuple[Disk, Meter]:
            if not TRACING.is_dir():
                lacks(f"{TRACING} is not mounted; mount -t tracefs tracefs {TRACING}")
            if kind in MKFS and not shutil.which(MKFS[kind][0]):
                lacks(f"{MKFS[kind][0]} is not installed; apt install {'xfsprogs' if kind == 'xfs' else 'e2fsprogs'}")
            loaded = load("cachestat", forbid=forbid)

            def counts() -> Counts:
                families = loaded.read()
                return Counts(*(families[f"bpf_page_cache_{name}"].series[0].value for name in Counts._fields))

            own = undo.enter_context(disk(kind, tmp_path))
            # The first read of a single page shows how this kernel tells a range's end; any program that starts does one.
            with own.file("first", PAGE) as file:
                os.pread(file.descriptor, PAGE, 0)
            return own, Meter(counts, undo.enter_context(witness(own)))

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


def _cold_and_warm(meter: Meter, file: File, chunk: int, read: Callable[[File, int, int], None]) -> list[str]:
    """Reads a file twice, `chunk` bytes at a time; what differs from what was there before each call."""
    asked = sum(len(pages) for _, pages in file.chunks(chunk))
    missing = 0

    def whole() -> None:
        nonlocal missing
        missing = 0
        for at, pages in file.chunks(chunk):
            missing += file.missing(pages)
            read(file, chunk, at)

    faults = []
    for state, prepare in (("cold", file.chill), ("warm", lambda: None)):
        found = meter.measure(whole, prepare)
        wanted = Counts(asked, missing, file.pages if state == "cold" else 0)
        assert file.cached() == file.pages
        assert (missing > 0) == (state == "cold")
        if found != wanted:
            faults.append(f"{file.path.name} {read.__name__} {chunk} {state}: {found}, not {wanted}")
    return faults


@pytest.mark.parametrize(("kind", "forbid"), [("ext4", ""), ("xfs", ""), ("ext4", "tp_btf"), ("xfs", "tp_btf")])
def test_reads_in_chunks(start: Start, kind: str, forbid: str) -> None:
    """The filesystems add folios of up to 2 MiB, and with fast readahead, slow devices a read finds part of its range there."""
    own, meter = start(kind, forbid)
    faults: list[str] = []
    with own.file("even", 4 * MIB) as even, own.file("odd", 3 * MIB + 1234) as odd:
        for chunk in CHUNKS:
            faults += _cold_and_warm(meter, even, chunk, _pread) + _cold_and_warm(meter, odd, chunk, _pread)
        for read in (_preadv, _read, _readv):
            for chunk in (5000, 1_000_000):
                faults += _cold_and_warm(meter, odd, chunk, read)
    assert faults == []
