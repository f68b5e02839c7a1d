# SPDX-License-Identifier: Apache-2.0
"""cgroup v2 ids to paths. An id is the inode number of the group's folder, so no privilege is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_WALK_AT_MOST_EVERY_S = 0.1  # a tree of 1,000 groups takes about 5 ms
_REMEMBERED = 10_000


def mount_point(mounts: Path = Path("/proc/self/mounts")) -> Path | None:
    """Where cgroup v2 is mounted, also beside v1 (/sys/fs/cgroup/unified)."""
    for line in mounts.read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    return None


def unit(path: str) -> str:
    """The innermost systemd unit in a cgroup's path; empty where there is none."""
    for part in reversed(path.split("/")):
        if part.endswith((".service", ".scope", ".socket", ".mount", ".swap")):
            return part
    return ""


class Paths:
    """Ids to paths (`/system.slice/x.service`), remembered while the group lives.

    An id that no walk since its first sight has found is of a group that is gone, and ids are not used again. So each
    group is looked for at once, and a group that is gone only once.
    """

    def __init__(self, root: Path | None, now: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._now = now
        self._known: dict[int, str] = {}
        self._missed: dict[int, float] = {}  # id to when it was first asked for in vain
        self._walked = float("-inf")

    def __call__(self, identifier: int) -> str:
        """The path, or the empty string when the group is gone or out of sight."""
        if identifier not in self._known and self._root is not None:
            if len(self._missed) > _REMEMBERED:
                self._missed.clear()
            first = self._missed.setdefault(identifier, self._now())
            if self._walked < first and self._now() - self._walked >= _WALK_AT_MOST_EVERY_S:
                self._walked = self._now()
                self._known = self._walk(self._root)
        return self._known.get(identifier, "")

    def _walk(self, root: Path) -> dict[int, str]:
        found = {}
        folders = [(str(root), "/")]
        while folders:
            folder, path = folders.pop()
            try:
                found[os.stat(folder).st_ino] = path
                with os.scandir(folder) as entries:
                    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:  # removed while we walk
                continue
            folders += [(f"{folder}/{name}", f"{path.rstrip('/')}/{name}") for name in names]
        return found
