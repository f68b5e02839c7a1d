# SPDX-License-Identifier: Apache-2.0
"""A process that the kernel kills because its memory cgroup is full, and what it leaves is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon import cgroups

LIMIT_BYTES = 48 << 20
_EAT = "import sys; x = bytearray(int(sys.argv[1]))"


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


def oom_kill(name: str, command: tuple[str, ...] = ()) -> int:
    """Runs a process into the limit of a memory cgroup (v1 or v2), in a v2 cgroup `name`; its pid."""
    root = cgroups.mount_point()
    assert root
    v1 = Path("/sys/fs/cgroup/memory")
    with folder(root / name) as group, folder((v1 if v1.is_dir() else root) / f"{Path(name).name}-memory") as memory:
        if v1.is_dir():
            (memory / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
            groups = (memory, group)
        else:
            (root / "cgroup.subtree_control").write_text("+memory")
            (group / "memory.max").write_text(str(LIMIT_BYTES))
            groups = (group,)
        victim = subprocess.Popen(
            command or (sys.executable, "-c", _EAT, str(4 * LIMIT_BYTES)),
            preexec_fn=lambda: join(*groups),
        )
        assert victim.wait(60) == -9
        return victim.pid
