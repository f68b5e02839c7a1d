# SPDX-License-Identifier: Apache-2.0
"""Pinned maps to rows: opens a collector's pins and reads them. Needs the right to read the pins, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import layout, libbpf, manifest, pins
from daemon.declare import Row
from daemon.errors import BpfmetricsdError
from daemon.libbpf import MapInfo, ProgramStatistics, RingBuffer
from daemon.manifest import Manifest, MapShape

LOSSES = ("map_full", "ring_full", "task_state")  # enum loss in bpf/include/program.h
RECURSION = "recursion"  # the kernel skipped a program because it was running on that CPU already
RING = "ringbuf"


@dataclass(frozen=True, slots=True)
class MapUse:
    """entries is None where it is not counted: arrays are always full, an LRU hash may be, others have no entries."""

    entries: int | None
    max_entries: int
    memory_bytes: int


@dataclass(slots=True)
class OpenMap:
    """A pinned map, its decoders, and how many bytes one lookup gives (all CPUs' values, each rounded up to 8)."""

    descriptor: int
    info: MapInfo
    key: layout.Decode
    value: layout.Decode
    value_size: int
    cpus: int
    entries: int | None = None

    def rows(self) -> list[Row]:
        rows = []
        step = self.value_size // self.cpus
        size = self.info.value_size
        unused = bytes(step)
        for key, raw in libbpf.map_items(self.descriptor, self.info, self.value_size):
            whole = bytes(raw)
            parts = [whole[i : i + step] for i in range(0, len(whole), step)]
            used = [part for part in parts if part != unused] or parts[:1]
            rows.append(Row(self.key(key), layout.merge([self.value(part[:size]) for part in used])))
        if self.is_hash:
            self.entries = len(rows)
        return rows

    @property
    def is_hash(self) -> bool:
        """Which can fill up: an LRU hash makes room by itself."""
        return self.info.type in ("hash", "percpu_hash")

    def count(self) -> None:
        self.entries = sum(1 for _ in libbpf.map_items(self.descriptor, self.info, self.value_size))


_NOT_LOADED = "not loaded; run 'bpfmetricsd load'"


def _cannot_open(path: Path, error: OSError) -> BpfmetricsdError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return BpfmetricsdError(f"{path} may not be read by this user; use sudo, or a member of the group that owns it")
    return BpfmetricsdError(f"{path} cannot be opened ({os.strerror(error.errno or 0)}); run 'bpfmetricsd load'")


def _open_map(path: Path, shape: MapShape) -> OpenMap:
    try:
        descriptor, info = pins.open_map(path)
    except OSError as error:
        raise _cannot_open(path, error) from error
    except ValueError as error:
        raise BpfmetricsdError(f"{path} is {error}; run 'bpfmetricsd load'") from error
    wanted = (shape.type, shape.key_size, shape.value_size, shape.max_entries)
    if info.shape() != wanted or layout.size(shape.value) > info.value_size:
        os.close(descriptor)
        raise BpfmetricsdError(
            f"{path} is a {info.type} map of another shape than its manifest says; run 'bpfmetricsd load'"
        )
    cpus = libbpf.possible_cpus() if info.type in libbpf.PER_CPU else 1
    step = -(-info.value_size // 8) * 8 if info.type in libbpf.PER_CPU else info.value_size
    return OpenMap(descriptor, info, layout.decoder(shape.key), layout.decoder(shape.value), step * cpus, cpus)


@dataclass(slots=True)
class Pins:
    """A collector's open pins. `close` undoes `open_pins`."""

    manifest: Manifest
    folder: Path
    stamp: tuple[int, int]
    maps: dict[str, OpenMap] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)
    ring: RingBuffer | None = None
    _others: list[int] = field(default_factory=list)
    _memory: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        if self.ring:
            self.ring.close()
        for descriptor in [one.descriptor for one in self.maps.values()] + [*self.programs.values(), *self._others]:
            os.close(descriptor)
        self.maps, self.programs, self._others, self.ring = {}, {}, [], None

    def tables(self, names: Iterable[str]) -> dict[str, list[Row]]:
        """The rows of these maps, none for a map that the options left out; of other hash maps only their number.

        Raises `BpfmetricsdError`.
        """
        wanted = frozenset(names)
        try:
            for name, one in self.maps.items():
                if name not in wanted and one.is_hash:
                    one.count()
            return {name: self.maps[name].rows() if name in self.maps else [] for name in wanted}
        except OSError as error:
            raise BpfmetricsdError(f"{self.folder}: a map cannot be read ({os.strerror(error.errno or 0)})") from error

    def detached(self) -> list[str]:
        """Programs whose links are gone: they count no more."""
        return [name for name in self.manifest.programs if not (self.folder / pins.LINKS / name).exists()]

    def statistics(self) -> dict[str, ProgramStatistics]:
        return {name: libbpf.program_statistics(descriptor) for name, descriptor in self.programs.items()}

    def uses(self) -> dict[str, MapUse]:
        """Fill, room and memory by map."""
        return {
            name: MapUse(self.maps[name].entries if name in self.maps else None, shape.max_entries, self._memory[name])
            for name, shape in self.manifest.maps.items()
        }


def open_pins(bpffs: Path, state: Path, collector: str, take: Callable[[Any], None] | None = None) -> Pins:
    """Opens a collector's pins. `take` gets each decoded record of its ring buffer. Raises `BpfmetricsdError`."""
    try:
        stamp = manifest_stamp(state, collector)
        known = manifest.read(state, collector)
    except manifest.DamagedManifest as error:
        raise BpfmetricsdError(str(error)) from error
    if known is None:
        raise BpfmetricsdError(_NOT_LOADED)
    if not known.maps:
        raise BpfmetricsdError(known.error or _NOT_LOADED)
    opened = Pins(known, bpffs / collector, stamp)
    try:
        _open_all(opened, take)
    except BaseException:
        opened.close()
        raise
    return opened


def _open_all(opened: Pins, take: Callable[[Any], None] | None) -> None:
    for name, shape in opened.manifest.maps.items():
        path = opened.folder / pins.MAPS / name
        if shape.type == RING:
            opened._others.append(_open_ring(opened, path, shape, take))
            descriptor = opened._others[-1]
        elif shape.type in libbpf.ITERABLE:
            opened.maps[name] = _open_map(path, shape)
            descriptor = opened.maps[name].descriptor
        else:
            descriptor, _ = pins.open_map(path)
            opened._others.append(descriptor)
        opened._memory[name] = libbpf.map_memory_bytes(descriptor)
    for name in opened.manifest.programs:
        path = opened.folder / pins.PROGRAMS / name
        try:
            opened.programs[name] = libbpf.obj_get(path, libbpf.F_RDONLY)
        except OSError as error:
            raise _cannot_open(path, error) from error


def _open_ring(opened: Pins, path: Path, shape: MapShape, take: Callable[[Any], None] | None) -> int:
    """Draining moves the consumer's position, which lies in the map: so this one is opened for writing."""
    try:
        descriptor, _ = pins.open_map(path, writable=take is not None)
        if take is not None:
            decode = layout.decoder(shape.value)
            opened.ring = RingBuffer(descriptor, lambda raw: take(decode(raw)))
    except (OSError, ValueError) as error:
        raise BpfmetricsdError(f"{path} cannot be drained ({error}); run 'bpfmetricsd load'") from error
    return descriptor


def manifest_stamp(state: Path, collector: str) -> tuple[int, int]:
    """Changes when the manifest is written again: then the pins must be opened again. (0, 0) without one."""
    try:
        found = manifest.path(state, collector).stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_mtime_ns)
