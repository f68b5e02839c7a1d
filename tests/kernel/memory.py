# SPDX-License-Identifier: Apache-2.0
"""Processes that the kernel kills because their memory cgroup is full, and what they leave is removed."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from daemon import cgroups

LIMIT_BYTES = 48 << 20
V1_MEMORY = Path("/sys/fs/cgroup/memory")
V1_FREEZER = Path("/sys/fs/cgroup/freezer")
_EAT = "import sys; x = bytearray(int(sys.argv[1])); print(flush=True); sys.stdin.read()"
_EAT_HUGE = """
import mmap, sys
x = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
x.madvise(mmap.MADV_HUGEPAGE)
x[::mmap.PAGESIZE] = bytes(len(x) // mmap.PAGESIZE)
"""
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A cgroup of the test's own."""
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def join(*groups: Path) -> None:
    """For `preexec_fn`: the child enters these cgroups before it begins."""
    for group in groups:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def control(group: Path) -> None:
    """Lets the memory controller of cgroup v2 have this group: all above it must hand it down."""
    root = cgroups.mount_point()
    assert root
    parents = [parent for parent in group.parents if parent == root or root in parent.parents]
    for parent in reversed(parents):
        (parent / "cgroup.subtree_control").write_text("+memory")


def kills_of(group: Path) -> int:
    """Of this group and those in it, as its `memory.events` tells (cgroup v2)."""
    return int(dict(line.split() for line in (group / "memory.events").read_text().splitlines())["oom_kill"])


@contextmanager
def limited(name: str) -> Iterator[tuple[Path, ...]]:
    """The groups to join: a v2 cgroup `name`, and a limit of memory, which is there too or in v1."""
    root = cgroups.mount_point()
    assert root
    with ExitStack() as undo:
        group = undo.enter_context(folder(root / name))
        if V1_MEMORY.is_dir():
            memory = undo.enter_context(folder(V1_MEMORY / f"bpfmetricsd-{os.getpid()}-{Path(name).name}"))
            (memory / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
            yield memory, group
        else:
            control(group)
            (group / "memory.max").write_text(str(LIMIT_BYTES))
            yield (group,)


@contextmanager
def process(groups: tuple[Path, ...], *command: str, score: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A child in these cgroups and with this oom_score_adj, with pipes to it and from it; gone afterwards."""

    def prepare() -> None:
        join(*groups)
        Path("/proc/self/oom_score_adj").write_text(str(score))

    child = subprocess.Popen(command, preexec_fn=prepare, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def eater(size: int) -> tuple[str, ...]:
    """A command that takes so much memory, says so with a line, and waits for the end of its input."""
    return (sys.executable, "-S", "-c", _EAT, str(size))


def big_eater(size: int) -> tuple[str, ...]:
    """The same in huge pages, without a word: all of a machine's memory, in seconds where faults are slow."""
    return (sys.executable, "-S", "-c", _EAT_HUGE, str(size // mmap.PAGESIZE * mmap.PAGESIZE))


def named(name: bytes, size: int) -> tuple[str, ...]:
    """The same under another name, of up to 15 bytes."""
    rename = f"import ctypes; ctypes.CDLL(None).prctl({_PR_SET_NAME}, {name!r}); "
    return (sys.executable, "-S", "-c", rename + _EAT, str(size))


def oom_kill(name: str, command: tuple[str, ...] = ()) -> int:
    """Runs a process into the limit of a memory cgroup (v1 or v2), in a v2 cgroup `name`; its pid."""
    with limited(name) as groups, process(groups, *(command or eater(4 * LIMIT_BYTES))) as victim:
        assert victim.wait(60) == -9
        return victim.pid
