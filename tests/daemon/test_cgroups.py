# SPDX-License-Identifier: Apache-2.0
"""Ids to paths, on a tree of ordinary folders: an id is an inode number there too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import cgroups
from daemon.cgroups import Paths, mount_point, pod, unit


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


UID, HASH = "1b2c3d4e-0123-4567-89ab-0123456789ab", "0123456789abcdef0123456789abcdef"
SLICE = UID.replace("-", "_")
ID = "c0ffee123456" + "7" * 52
POD = ("pod", UID)
CONTAINER = ("container", "c0ffee123456")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # systemd driver: containerd, CRI-O, Docker; the three classes of service
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope", (CONTAINER, POD)),
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/crio-{ID}.scope",
            (CONTAINER, POD),
        ),
        (
            f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice/docker-{ID}.scope",
            (CONTAINER, POD),
        ),
        # cgroupfs driver
        (f"/kubepods/pod{UID}/{ID}", (CONTAINER, POD)),
        (f"/kubepods/burstable/pod{UID}/{ID}", (CONTAINER, POD)),
        (f"/kubepods/besteffort/pod{UID}/crio-{ID}", (CONTAINER, POD)),
        # a static pod
        (f"/kubepods/burstable/pod{HASH}/{ID}", (CONTAINER, ("pod", HASH))),
        # a kubelet with --cgroup-root, nodes that are containers themselves
        (f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{SLICE}.slice/crio-{ID}.scope", (CONTAINER, POD)),
        (f"/docker/{'9' * 64}/kubelet/kubepods/pod{UID}/{ID}", (CONTAINER, POD)),
        # the runtime expects systemd's names, the kubelet makes others
        (
            f"/system.slice/containerd.service/kubepods-burstable-pod{SLICE}.slice:cri-containerd:{ID}",
            (CONTAINER, POD),
        ),
        # groups that a container made, Docker inside of a pod
        (f"/kubepods/pod{UID}/{ID}/init.scope", (CONTAINER, POD)),
        (f"/kubepods/pod{UID}/{ID}/docker/{'9' * 64}", (CONTAINER, POD)),
        # an outermost part that had no room
        (f"…/kubepods.slice/kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope", (CONTAINER, POD)),
        # in the pod and in none of its containers
        (f"/kubepods/pod{UID}", (POD,)),
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/crio-conmon-1.scope", (POD,)),
        # not of Kubernetes
        (f"/system.slice/docker-{ID}.scope", ()),
        (f"/machine.slice/libpod-{ID}.scope", ()),
        (f"/pod{UID}/{ID}", ()),
        ("/kubepods.slice", ()),
        (f"/kubepods/pod{UID}x/{ID}", ()),
        (f"/kubepods/tripod{UID}/{ID}", ()),
        ("/system.slice/x.service", ()),
        ("/", ()),
        ("", ()),
    ],
)
def test_pod(path: str, expected: tuple[tuple[str, str], ...]) -> None:
    assert pod(path) == expected


@given(
    uid=st.uuids(),
    number=st.integers(0, 16**64 - 1),
    kind=st.sampled_from(["", "burstable", "besteffort"]),
    prefix=st.sampled_from(["cri-containerd-", "crio-", "docker-"]),
    inside=st.sampled_from(["", "/init.scope", "/a b/c"]),
)
def test_both_drivers_name_the_same_pod_and_container(
    uid: object, number: int, kind: str, prefix: str, inside: str
) -> None:
    identifier = f"{number:064x}"
    name = "-".join(filter(None, ["kubepods", kind, f"pod{uid}".replace("-", "_")]))
    parents = ["kubepods.slice", f"kubepods-{kind}.slice"] if kind else ["kubepods.slice"]
    systemd = "/".join(["", *parents, f"{name}.slice", f"{prefix}{identifier}.scope"]) + inside
    cgroupfs = "/".join(["", "kubepods", *filter(None, [kind]), f"pod{uid}", identifier]) + inside
    assert pod(systemd) == pod(cgroupfs) == (("container", identifier[:12]), ("pod", str(uid)))


@given(st.text(alphabet="/-_:.abcdef0123456789podkubesli", max_size=300))
def test_what_is_no_pod_has_no_id_of_another_length(path: str) -> None:
    for name, value in pod(f"/kubepods{path}"):
        assert len(value) in {"container": (12,), "pod": (32, 36)}[name]


@pytest.mark.parametrize(
    ("mountinfo", "expected"),
    [
        ("30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"),
        (
            "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "31 24 0:27 / /sys/fs/cgroup/unified rw shared:5 master:1 - cgroup2 cgroup2 rw\n",
            "/sys/fs/cgroup/unified",
        ),
        # a container's own group, and the host's tree, as a reader in its own cgroup namespace sees them
        (
            "40 24 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
            "41 24 0:26 /../../../.. /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
            "/host/sys/fs/cgroup",
        ),
        (
            "41 24 0:26 /../.. /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"
            "42 24 0:26 /../../x.slice /x ro - cgroup2 cgroup2 rw\n"
            "43 24 0:26 /.. /y ro - cgroup2 cgroup2 rw\n",
            "/host/sys/fs/cgroup",
        ),
        # without a cgroup namespace
        (
            "40 24 0:26 /kubepods/pod1/c /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
            "41 24 0:26 / /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
            "/host/sys/fs/cgroup",
        ),
        # the same twice: the first
        ("1 0 0:26 / /a rw - cgroup2 x rw\n2 0 0:26 / /b rw - cgroup2 x rw\n", "/a"),
        ("30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", None),
        ("", None),
    ],
)
def test_mount_point(tmp_path: Path, mountinfo: str, expected: str | None) -> None:
    (tmp_path / "mountinfo").write_text(mountinfo)
    assert mount_point(tmp_path / "mountinfo") == (Path(expected) if expected else None)
