# SPDX-License-Identifier: Apache-2.0
"""The folder of pins: what lies there, whether it is ours, and how it changes hands.

<bpffs>/<collector>/{maps,links,programs}/<name>      0640 root:<group> (ring buffers 0660)
<bpffs>/<collector>-new/…                             half-written; swept away by the next load
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from daemon import libbpf
from daemon.errors import BpfmetricsdError, UnsupportedError
from daemon.libbpf import MapInfo
from daemon.manifest import Manifest

MAPS, LINKS, PROGRAMS = "maps", "links", "programs"
KINDS = (MAPS, LINKS, PROGRAMS)
STAGING = "-new"  # bpffs allows no dot in a name
CONTROL = "control"
NET_NAMESPACE = "net_namespace"
USUAL_MOUNT = Path("/sys/fs/bpf")


@dataclass(slots=True)
class Descriptors:
    """Open BPF objects by name; `close` undoes."""

    maps: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        for descriptor in [*self.maps.values(), *self.links.values(), *self.programs.values()]:
            os.close(descriptor)
        self.maps, self.links, self.programs = {}, {}, {}


def is_bpffs(path: Path) -> bool:
    """Whether a folder lies on a BPF file system (its mount's type in /proc/self/mountinfo)."""
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, source = line.partition(" - ")
            if fields.split()[2] == wanted:
                return source.split()[0] == "bpf"
    return False


def prepare_root(bpffs: Path, group: int) -> None:
    """Makes the folder of all pins; mounts bpffs where its parent is not one."""
    parent = bpffs.parent
    if not is_bpffs(parent):
        _mount(parent)
    try:
        bpffs.mkdir(exist_ok=True)
        os.chown(bpffs, 0, group)
        bpffs.chmod(0o750)
    except OSError as error:
        raise BpfmetricsdError(f"{bpffs} cannot be made ({error.strerror}); remove what stands in its way") from error


def _mount(parent: Path) -> None:
    """Mounts bpffs at its usual place, and nowhere else: another folder may hold somebody's files."""
    why = "only /sys/fs/bpf is mounted by itself"
    if parent == USUAL_MOUNT and parent.is_dir():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"bpf", bytes(parent), b"bpf", 0, b"mode=0700") == 0:
            return
        why = os.strerror(ctypes.get_errno())
    raise UnsupportedError(
        f"{parent} is not a BPF file system and was not mounted as one ({why}); "
        f"run 'mount -t bpf bpf {parent}', or set 'bpffs' to a folder below one"
    )


def pin(folder: Path, objects: Descriptors, group: int) -> None:
    """Pins all objects into a folder that does not exist yet."""
    folder.mkdir()
    for kind, descriptors in ((MAPS, objects.maps), (LINKS, objects.links), (PROGRAMS, objects.programs)):
        (folder / kind).mkdir()
        for name, descriptor in descriptors.items():
            libbpf.obj_pin(descriptor, folder / kind / name)
    grant(folder, group, frozenset(n for n, d in objects.maps.items() if libbpf.map_info(d).type == "ringbuf"))


def grant(folder: Path, group: int, rings: frozenset[str] | None = None) -> None:
    """Lets the server's group read the pins; ring buffers also be written, for that is how one is drained."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, group)
        if path.is_dir():
            path.chmod(0o750)
        elif rings is not None:
            path.chmod(0o660 if path.parent.name == MAPS and path.name in rings else 0o640)


def remove(folder: Path) -> bool:
    """Unpins and removes a collector's folder; links go first, so that nothing counts into maps that are gone.

    bpffs holds only pins and folders. True when there was something.
    """
    if not folder.is_dir() or folder.is_symlink():
        if folder.is_symlink() or folder.exists():
            folder.unlink()
            return True
        return False
    for kind in (LINKS, PROGRAMS, MAPS):
        remove(folder / kind)
    for entry in folder.iterdir():
        remove(entry)
    folder.rmdir()
    return True


def swap(bpffs: Path, collector: str) -> None:
    """The new folder takes the place of the old one."""
    remove(bpffs / collector)
    (bpffs / f"{collector}{STAGING}").rename(bpffs / collector)


def open_map(path: Path, writable: bool = False) -> tuple[int, MapInfo]:
    """A pinned map's descriptor and shape. Raises `OSError` (no pin, no right) or `ValueError` (not a map)."""
    descriptor = libbpf.obj_get(path, 0 if writable else libbpf.F_RDONLY)
    try:
        return descriptor, libbpf.map_info(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a collector's pins. With sound maps, new programs can go on counting into them."""

    maps: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.maps or self.programs)

    def __str__(self) -> str:
        return "; ".join((*self.maps, *self.programs))


def faults(folder: Path, manifest: Manifest) -> Faults:
    """Measures pins against the manifest that speaks of them; needs the right to open them for writing."""
    maps, programs = [], []
    for name, shape in manifest.maps.items():
        path = folder / MAPS / name
        try:
            descriptor, info = open_map(path, writable=True)
            if name == CONTROL and libbpf.map_lookup(descriptor, bytes(4), 8) != manifest.generation.to_bytes(
                8, "little"
            ):
                programs.append(f"{path} names another generation of programs")
            os.close(descriptor)
        except (OSError, ValueError) as error:
            maps.append(_fault(path, error))
            continue
        wanted = (shape.type, shape.key_size, shape.value_size, shape.max_entries)
        if info.shape() != wanted:
            maps.append(f"{path} is a {info.type} map of another shape {info.shape()[1:]}, not {wanted}")
    for name in manifest.programs:
        path = folder / LINKS / name
        try:
            descriptor = libbpf.obj_get(path)
        except OSError as error:
            programs.append(_fault(path, error))
            continue
        if not libbpf.is_link(descriptor):
            programs.append(f"{path} is not a BPF link")
        os.close(descriptor)
    return Faults(tuple(maps), tuple(programs))


def _fault(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return f"{path} is missing"
    if isinstance(error, OSError):
        return f"{path} cannot be opened as a BPF pin ({os.strerror(error.errno or 0)})"
    return f"{path} is {error}"


def names(bpffs: Path) -> list[str]:
    """What lies in the folder of pins."""
    return sorted(entry.name for entry in bpffs.iterdir()) if bpffs.is_dir() else []
