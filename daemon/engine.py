# SPDX-License-Identifier: Apache-2.0
"""All collectors together: one reading of every map, the daemon's own metrics, health. Knows nothing of HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import collectors
from daemon import __version__, cgroups, coverage, reader, selfmetrics
from daemon.clock import WallClock
from daemon.config import Config
from daemon.declare import Context, Event
from daemon.errors import BpfmetricsdError
from daemon.model import Family
from daemon.reader import Pins
from daemon.unit import Unit

log = logging.getLogger("bpfmetricsd")


class Engine:
    """Reads on demand. `send` takes the events of the ring buffers; None leaves the rings to somebody else."""

    def __init__(self, config: Config, send: Callable[[Event], None] | None = None) -> None:
        self.config = config
        self._send = send
        self._paths = cgroups.Paths(cgroups.mount_point())
        self._wall_clock = WallClock()
        self._units = _units(config)

    def names(self) -> frozenset[str]:
        return frozenset(self._units)

    def configure(self, config: Config) -> None:
        """Takes another configuration; pins that both name are opened again when they have changed, as always."""
        before = self._units
        self._units = _units(config)
        self.config = config
        for name, unit in before.items():
            if name in self._units and self._units[name].config == unit.config:
                self._units[name] = unit
            else:
                unit.close()

    def close(self) -> None:
        for unit in self._units.values():
            unit.close()

    def collect(self, names: frozenset[str] | None = None) -> list[Family]:
        """Every family of these collectors (all: None), and the daemon's own. One failure costs one collector."""
        families: list[Family] = []
        for name, unit in self._units.items():
            if names is None or name in names:
                families += self._read(unit)
        return families + selfmetrics.families(self._units)

    def decode(self, name: str) -> list[Family]:
        """One collector's families. Raises `BpfmetricsdError` with the reason when it is down."""
        unit = self._units[name]
        families = self._read(unit)
        if not unit.up:
            raise BpfmetricsdError(f"{name}: {unit.error}")
        return families

    def drain(self) -> int:
        """Takes what lies in the ring buffers; how many events."""
        count = 0
        for unit in self._units.values():
            self._open(unit)
            if unit.pins and unit.pins.ring:
                count += unit.pins.ring.drain()
        return count

    def _read(self, unit: Unit) -> list[Family]:
        began = time.perf_counter()
        try:
            return self._decode(unit)
        except Exception as error:  # a fault in one collector must not take the page with it
            loaded_by = unit.pins.manifest.version if unit.pins else __version__
            fault = f"cannot be read ({error!r}); run 'bpfmetricsd load --force', and report it if it stays"
            if loaded_by != __version__:
                fault = f"was loaded by bpfmetricsd {loaded_by}, and this is {__version__}; run 'bpfmetricsd load'"
            if fault != unit.error:  # once, not at each scrape
                log.exception("%s: %s", unit.collector.name, fault)
            unit.error = fault
            return []
        finally:
            unit.reading_s = time.perf_counter() - began

    def _decode(self, unit: Unit) -> list[Family]:
        self._open(unit)
        if unit.pins is None:
            return []
        truth = coverage.texts(unit.collector)  # before our own, so that the kernel is never ahead
        try:
            rows = unit.pins.tables((*unit.collector.tables, "losses"))
        except BpfmetricsdError as error:
            unit.error = str(error)
            return []
        detached = unit.pins.detached()
        unit.error = f"{', '.join(detached)} detached; run 'bpfmetricsd load'" if detached else ""
        unit.told_losses = {reader.LOSSES[row.key]: row.value for row in rows.pop("losses")}
        unit.coverage = coverage.ratio(unit.collector, unit.pins.manifest.truth, truth, rows)
        decoded = unit.collector.decode(rows, self._context(unit, unit.pins))
        unit.dropped = max(unit.dropped, decoded.dropped)
        return list(decoded.families)

    def _open(self, unit: Unit) -> None:
        """Opens pins that are not open, or that have been loaded again since."""
        name = unit.collector.name
        if unit.pins and unit.pins.stamp == reader.manifest_stamp(self.config.state, name):
            return
        unit.close()
        take = (lambda record: self._event(unit, record)) if self._send and unit.collector.event else None
        try:
            unit.pins = reader.open_pins(self.config.bpffs, self.config.state, name, take)
            unit.error, unit.warning = "", unit.pins.manifest.error
        except BpfmetricsdError as error:
            unit.error = str(error)

    def _event(self, unit: Unit, record: Any) -> None:
        """Called by libbpf for each record: nothing may escape from here."""
        try:
            if self._send and unit.pins and unit.collector.event:
                self._send(unit.collector.event(record, self._context(unit, unit.pins)))
        except Exception:
            log.exception("%s: an event could not be told", unit.collector.name)

    def _context(self, unit: Unit, opened: Pins) -> Context:
        return Context(
            options=opened.manifest.options, max_series=unit.config.max_series, created=opened.manifest.started,
            cgroup_path=self._paths, wall_clock=self._wall_clock,
        )  # fmt: skip

    def ready(self) -> list[str]:
        """Why not; empty when every configured collector is up and none failed to load."""
        return list(_reasons(self._units.values()))

    def status(self, fresh: bool = True) -> dict[str, Any]:
        """The collectors' part of `bpfmetricsd status --json`; not `fresh` is as of the last reading."""
        if fresh:
            self.collect()
        return {"collectors": {name: unit.status() for name, unit in self._units.items()}}

    def up(self) -> dict[str, bool]:
        """As of the last reading."""
        return {name: unit.up for name, unit in self._units.items()}


def _units(config: Config) -> dict[str, Unit]:
    return {name: Unit(collectors.BY_NAME[name], own) for name, own in config.collectors.items()}


def _reasons(units: Iterable[Unit]) -> Iterable[str]:
    for unit in units:
        if unit.error or unit.warning:
            yield f"{unit.collector.name}: {unit.error or unit.warning}"
