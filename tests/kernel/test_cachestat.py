# SPDX-License-Identifier: Apache-2.0
"""cachestat against arithmetic, mincore, cachestat(2) and getrusage."""

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
    MKFS, PAGE, TRACING, Counts, Disk, File, Meter, Reader, disk, faults, nothing, pages_of, present, vmstat, witness,
)  # fmt: skip

pytestmark = pytest.mark.kernel
MiB = 1 << 20
Start = Callable[..., tuple[Disk, Meter]]


@pytest.fixture
def start(load: Callable[..., Any], lacks: Callable[[str], NoReturn], tmp_path: Path) -> Iterator[Start]:
    """`start("xfs")`: a filesystem, and a meter of what is done to it."""
    with ExitStack() as undo:

        def do(kind: str, forbid: str = "") -> tuple[Disk, Meter]:
            if not TRACING.is_dir():
                lacks(f"{TRACING} is not mounted; mount -t tracefs tracefs /sys/kernel/tracing")
            if kind in MKFS and not shutil.which(MKFS[kind][0]):
                lacks(f"{MKFS[kind][0]} is not installed; apt install {'xfsprogs' if kind == 'xfs' else 'e2fsprogs'}")
            loaded = load("cachestat", forbid=forbid)

            def counts() -> Counts:
                families = loaded.read()
                return Counts(*(families[f"bpf_page_cache_{name}"].series[0].value for name in Counts._fields))

            own = undo.enter_context(disk(kind, tmp_path))
            meter = Meter(counts, undo.enter_context(witness(own)))
            # The first read of a single page shows how the kernel tells a range's end; any program's start does that.
            with own.file("first", PAGE) as file:
                file.read(PAGE)
            return own, meter

        yield do


@pytest.mark.parametrize(("kind", "forbid"), [("ext4", ""), ("xfs", ""), ("ext4", "tp_btf"), ("xfs", "tp_btf")])
def test_reads(start: Start, kind: str, forbid: str) -> None:
    """A cold and a warm pass, in chunks of every shape: accesses by arithmetic, misses by what was there before each call."""
    own, meter = start(kind, forbid)
    found: dict[str, Counts] = {}
    wanted: dict[str, Counts] = {}
    with own.file("even", 4 * MiB) as even, own.file("odd", 3 * MiB + 1234) as odd:
        for file in (even, odd):
            for chunk in (PAGE, 5000, 100_000, 128 << 10, 1_000_000, MiB):
                name = f"{file.path.name} {chunk}"
                asked = file.asked(chunk)
                missing = []

                def cold() -> None:
                    missing.append(0)
                    for offset in range(0, file.size, chunk):
                        first, last = pages_of(offset, min(chunk, file.size - offset))
                        missing[-1] += last + 1 - first - present(file.descriptor, first, last)
                        os.pread(file.descriptor, chunk, offset)

                found[f"{name} cold, by call"] = meter.measure(cold, file.chill)
                wanted[f"{name} cold, by call"] = Counts(asked, missing[-1], file.pages)
                result = meter.measure(lambda: file.read(chunk), file.chill)
                found[f"{name} cold"] = result._replace(misses=0)  # of these the device's speed decides
                wanted[f"{name} cold"] = Counts(asked, 0, file.pages)
                assert file.cached() == file.pages
                assert 0 < result.misses <= file.pages
                found[f"{name} warm"] = meter.measure(lambda: file.read(chunk))
                wanted[f"{name} warm"] = Counts(asked)
    assert found == wanted
