# SPDX-License-Identifier: Apache-2.0
"""What the server serves: the engine, the journal and the configuration file behind one Protocol (`app.Source`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon import __version__, page, reader, recent
from daemon.cards import View
from daemon.config import CollectorConfig, Config
from daemon.engine import Engine
from daemon.journal import Journal
from daemon.model import Family
from daemon.recent import Reading, Recent

_log = logging.getLogger("bpfmetricsd")
_STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
_NEARLY = 0.9  # ticks come a little early or late, and one that came early must not wait for the next
_SNMP = Path("/proc/net/snmp")
_GONE = (
    "the folder of pins was removed since this process started; run 'systemctl restart bpfmetricsd-load', or"
    " 'bpfmetricsd load' and start this process again"
)


def describe(
    engine: Engine, bpffs: Path, reasons: Sequence[str] = (), notes: Sequence[str] = (), fresh: bool = True
) -> dict[str, Any]:
    """The JSON of `/status` and of `bpfmetricsd status --json`; not `fresh` is as of the engine's last reading.

    `reasons` say why not all is well, beside what the engine finds; `notes` are what a person should know.
    """
    found = engine.status(fresh)
    every = [*engine.ready(), *reasons]
    about = {"version": __version__, "kernel": os.uname().release, "bpffs": str(bpffs)}
    health = {"ready": not every, "reasons": every, "notes": list(notes), "bpf_stats_enabled": _counts_run_time()}
    return {**about, **found, **health}


def _counts_run_time() -> bool:
    try:
        return _STATISTICS.read_text().strip() == "1"
    except OSError:
        return False


def _reading(families: Sequence[Family], at: float) -> Reading:
    try:
        segments = recent.out_segments(_SNMP.read_text())
    except OSError:  # /proc is closed to this service
        segments = None
    return recent.read(families, at, segments)


class Service:
    """`bpffs` is the folder of pins as this process reaches it: `Path(".")` when it may no longer walk there."""

    def __init__(
        self, path: Path, read: Callable[[Path], Config], config: Config, bpffs: Path, notes: Sequence[str] = ()
    ) -> None:
        self._path, self._read = path, read
        self._began = self._config = config
        self._bpffs = bpffs
        self._notes = tuple(notes)
        self._restart = ""
        self._read_at = float("-inf")
        self._recent = Recent()
        self._engine = Engine(self._reachable(config), Journal().send if config.journal else None)

    def names(self) -> frozenset[str]:
        return self._engine.names()

    def collect(self, names: frozenset[str] | None = None) -> list[Family]:
        families = self._engine.collect(names)
        if names is None:
            self._read_at = time.monotonic()
            if self._recent.due(self._read_at):
                self._recent.keep(_reading(families, self._read_at))
        return families

    def ready(self) -> list[str]:
        return [*self._engine.ready(), *self._gone()]

    def status(self) -> dict[str, Any]:
        return self._status(fresh=True)

    def _status(self, fresh: bool) -> dict[str, Any]:
        notes = [*self._notes, *filter(None, [self._restart])]
        return describe(self._engine, self._began.bpffs, self._gone(), notes, fresh)

    def page(self) -> str:
        families = self.collect()
        now = self._recent.now(_reading(families, self._read_at))
        view = View(now, {family.metric.name: family for family in families}, time.time())
        return page.render(self._status(fresh=False), view, os.uname().nodename)

    def tick(self) -> str:
        """Takes the events; reads the maps when nobody has scraped for an interval. A line that says how all is."""
        self._engine.drain()
        if time.monotonic() - self._read_at >= _NEARLY * self._began.interval:
            self.collect()
        up = self._engine.up()
        summary = f"{sum(up.values())} of {len(up)} collectors up"
        return "; ".join([summary, *self.ready(), *self._notes, *filter(None, [self._restart])])

    def reload(self) -> str:
        """Raises UsageError, and then all stays as it was."""
        before, after = self._config, self._read(self._path)
        self._engine.configure(self._reachable(after))
        self._config = after
        keys = must_restart(self._began, after)
        self._restart = f"restart bpfmetricsd to put {', '.join(keys)} in force" if keys else ""
        every = {*before.collectors, *after.collectors}
        written = {name: reader.manifest_stamp(self._began.state, name)[1] for name in every}
        names = must_load(before, after, written, self._path.stat().st_ctime_ns)
        load = f"run 'bpfmetricsd load' for {', '.join(names)}" if names else ""
        count = f"configuration read again: {len(after.collectors)} collectors"
        line = "; ".join(filter(None, [count, load, self._restart]))
        _log.info(line)
        return line

    def close(self) -> None:
        self._engine.close()

    def _reachable(self, config: Config) -> Config:
        return replace(config, bpffs=self._bpffs, state=self._began.state)

    def _gone(self) -> list[str]:
        """A process that reaches the folder because it stands in it, or has it mounted, cannot see the one that
        replaced it."""
        try:
            return [_GONE] if os.stat(self._bpffs).st_nlink == 0 else []
        except OSError:
            return []


def must_restart(began: Config, now: Config) -> list[str]:
    """The keys that a running server cannot change."""
    keys = {
        "server.listen": began.server.listen != now.server.listen,
        "server.web_config": began.server.web_config != now.server.web_config,
        "interval": began.interval != now.interval,
        "journal": began.journal != now.journal,
        "bpffs": began.bpffs != now.bpffs,
        "state": began.state != now.state,
    }
    return [key for key, changed in keys.items() if changed]


def must_load(before: Config, after: Config, written_ns: Mapping[str, int], edited_ns: int) -> list[str]:
    """The collectors whose programs are not what the file says: loaded before it was edited, or no longer in it.

    `written_ns` is when each collector's manifest was written (0: there is none), `edited_ns` when the file was.
    """
    names = []
    for name, own in after.collectors.items():
        known = before.collectors.get(name)
        changed = known is None or _compiled(known) != _compiled(own)
        if not written_ns[name] or (changed and written_ns[name] < edited_ns):
            names.append(name)
    return names + [name for name in before.collectors if name not in after.collectors and written_ns[name]]


def _compiled(own: CollectorConfig) -> tuple[object, ...]:
    """What is compiled into the programs."""
    return (dict(own.options), own.exemplars, own.exemplar_interval if own.exemplars else None)
