# SPDX-License-Identifier: Apache-2.0
"""cgroup v2 ids to paths. An id is the inode number of the group's folder, so no privilege is needed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

_WALK_AT_MOST_EVERY_S = 0.1  # a tree of 1,000 groups takes about 5 ms
_REMEMBERED = 10_000


# Kubernetes' folder of a pod, of either cgroup driver; a static pod's id is a hash without dashes. A runtime that is
# set up for the other driver puts the pod's and the container's name into one folder, with colons between.
_UID = "[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD = re.compile(rf"[-/]pod({_UID})(?:\.slice)?(?=[/:]|$)")
_CONTAINER = re.compile(r"[/:-]([0-9a-f]{64})(?:\.scope)?(?=/|$)")
_SHORT = 12  # digits of a container's id, as container tools print it


def mount_point(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path | None:
    """Where cgroup v2 is mounted, also beside v1 (/sys/fs/cgroup/unified); of several mounts, the one that shows most.

    A container has a mount of its own group alone, and may be given the host's: its root is above the reader's
    (`/../..` in /proc/PID/mountinfo).
    """
    found = []
    for line in mountinfo.read_text().splitlines():
        fields, _, source = line.partition(" - ")
        root, folder = fields.split()[3:5]
        if source.split()[0] == "cgroup2":
            parts = [part for part in root.split("/") if part]
            above = parts.count("..")
            found.append((-above, len(parts) - above, folder))
    return Path(min(found, key=lambda one: one[:2])[2]) if found else None


def unit(path: str) -> str:
    """The innermost systemd unit in a cgroup's path; empty where there is none."""
    for part in reversed(path.split("/")):
        if part.endswith((".service", ".scope", ".socket", ".mount", ".swap")):
            return part
    return ""


def pod(path: str) -> tuple[tuple[str, str], ...]:
    """`container` (12 digits of its id) and `pod` (its UID) of a path that Kubernetes made; nothing for another one.

    Processes of a pod that are in none of its containers have no `container`.
    """
    found = _POD.search(path) if "kubepods" in path else None
    if found is None:
        return ()
    uid = ("pod", found[1].replace("_", "-"))
    container = _CONTAINER.search(path, found.end())
    return (("container", container[1][:_SHORT]), uid) if container else (uid,)


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
