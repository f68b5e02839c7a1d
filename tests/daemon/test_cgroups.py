# SPDX-License-Identifier: Apache-2.0
"""Ids to paths, on a tree of ordinary folders: an id is an inode number there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon import cgroups
from daemon.cgroups import Paths, mount_point, unit


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The roots of the walks that were made."""
    made: list[Path] = []
    walk = Paths._walk

    def counted(self: Paths, root: Path) -> dict[int, str]:
        made.append(root)
        return walk(self, root)

    monkeypatch.setattr(Paths, "_walk", counted)
    return made


def group(root: Path, path: str) -> int:
    """Makes it; its id."""
    folder = root / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.stat().st_ino


def test_paths_begin_at_the_mount_point(tmp_path: Path, clock: Clock) -> None:
    inner, outer = group(tmp_path, "/system.slice/x.service"), group(tmp_path, "/system.slice")
    paths = Paths(tmp_path, clock)
    assert paths(inner) == "/system.slice/x.service"
    assert paths(outer) == "/system.slice"
    assert paths(tmp_path.stat().st_ino) == "/"


def test_odd_names(tmp_path: Path, clock: Clock) -> None:
    for name in ("a b", 'q"uote', "back\\slash", "…", "dev-disk-by\\x2did.swap"):
        assert Paths(tmp_path, clock)(group(tmp_path, name)) == f"/{name}"


def test_files_and_links_are_no_groups(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "cgroup.procs").touch()
    group(tmp_path, "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    paths = Paths(tmp_path, clock)
    assert paths((tmp_path / "cgroup.procs").stat().st_ino) == ""
    assert paths(group(tmp_path, "a")) == "/a"


def test_what_is_known_costs_no_walk(tmp_path: Path, clock: Clock, walks: list[Path]) -> None:
    identifier = group(tmp_path, "a")
    paths = Paths(tmp_path, clock)
    for _ in range(3):
        clock.now += 60
        assert paths(identifier) == "/a"
    assert len(walks) == 1


def test_a_new_group_is_found_at_once(tmp_path: Path, clock: Clock, walks: list[Path]) -> None:
    paths = Paths(tmp_path, clock)
    assert paths(group(tmp_path, "a")) == "/a"
    clock.now += 1
    assert paths(group(tmp_path, "b")) == "/b"
    assert len(walks) == 2


def test_a_group_that_is_gone_is_looked_for_once(tmp_path: Path, clock: Clock, walks: list[Path]) -> None:
    paths = Paths(tmp_path, clock)
    for _ in range(5):
        clock.now += 60
        assert paths(1) == ""
    assert len(walks) == 1


def test_many_new_ids_at_once_make_one_walk(tmp_path: Path, clock: Clock, walks: list[Path]) -> None:
    """Those that were not found are looked for again when the next walk is due."""
    paths = Paths(tmp_path, clock)
    paths(1)
    clock.now += 0.01
    identifier = group(tmp_path, "late")
    assert paths(identifier) == ""
    assert len(walks) == 1
    clock.now += 1
    assert paths(identifier) == "/late"
    assert len(walks) == 2


def test_a_removed_group_is_forgotten_with_the_next_walk(tmp_path: Path, clock: Clock) -> None:
    identifier = group(tmp_path, "a")
    paths = Paths(tmp_path, clock)
    assert paths(identifier) == "/a"
    (tmp_path / "a").rmdir()
    assert paths(identifier) == "/a", "remembered: its series may be read once more"
    clock.now += 60
    paths(1)
    assert paths(identifier) == ""


def test_ids_of_groups_that_are_gone_do_not_pile_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_REMEMBERED", 10)
    paths = Paths(tmp_path, clock)
    for identifier in range(1, 100):
        paths(identifier)
    assert len(paths._missed) <= 11


def test_without_cgroup_v2_there_is_no_path() -> None:
    assert Paths(None)(1) == ""


def test_a_folder_that_vanishes_during_a_walk(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path, "gone")
    stays = group(tmp_path, "stays")
    scandir = cgroups.os.scandir

    def vanishing(folder: str) -> object:
        if folder.endswith("gone"):
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(cgroups.os, "scandir", vanishing)
    assert Paths(tmp_path, clock)(stays) == "/stays"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/system.slice/x.service", "x.service"),
        ("/user.slice/user-0.slice/session-1.scope", "session-1.scope"),
        ("/user.slice/user@0.service/app.slice/y.service", "y.service"),
        ("/system.slice/x.service/worker", "x.service"),
        ("/system.slice/swap.swap", "swap.swap"),
        ("/system.slice/dbus.socket", "dbus.socket"),
        ("/system.slice/mnt.mount", "mnt.mount"),
        ("…/b/c.service", "c.service"),
        ("/system.slice", ""),
        ("/", ""),
        ("", ""),
    ],
)
def test_unit(path: str, expected: str) -> None:
    assert unit(path) == expected


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", Path("/sys/fs/cgroup")),
        (
            "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            Path("/sys/fs/cgroup/unified"),
        ),
        ("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n", None),
        ("", None),
    ],
)
def test_mount_point(tmp_path: Path, mounts: str, expected: Path | None) -> None:
    (tmp_path / "mounts").write_text(mounts)
    assert mount_point(tmp_path / "mounts") == expected
