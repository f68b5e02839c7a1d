# SPDX-License-Identifier: Apache-2.0
"""A configured collector as the server sees it: its open pins or the reason why there are none, and its health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from daemon import reader
from daemon.config import CollectorConfig
from daemon.declare import AGAIN, Collector
from daemon.libbpf import ProgramStatistics
from daemon.reader import Pins


@dataclass(slots=True)
class Unit:
    """`error`: it is down. `warning`: it counts, but its last load failed. `reading_s`: what the last reading took."""

    collector: Collector
    config: CollectorConfig
    pins: Pins | None = None
    error: str = "not read yet"
    warning: str = ""
    reading_s: float = 0.0
    dropped: int = 0
    coverage: float | None = None
    told_losses: Mapping[str, int] = field(default_factory=dict)

    @property
    def up(self) -> bool:
        return not self.error

    def close(self) -> None:
        if self.pins:
            self.pins.close()
            self.pins = None

    def losses(self) -> dict[str, int]:
        """Events lost, by reason: told by the programs, and those that the kernel skipped to avoid recursion."""
        return {**self.told_losses, reader.RECURSION: missed(self.pins.statistics()) if self.pins else 0}

    def status(self) -> dict[str, Any]:
        """One collector's part of `bpfmetricsd status --json`."""
        found: dict[str, Any] = {
            "up": self.up, "error": self.error or self.warning or None, "reading_seconds": self.reading_s,
        }  # fmt: skip
        if self.pins is None:
            return found
        known = self.pins.manifest
        statistics = self.pins.statistics()
        programs = {
            name: {
                "hook": info.hook, "fidelity": info.fidelity, "reason": info.approximate or None,
                "runs": statistics[name].runs, "run_time_ns": statistics[name].run_time_ns,
            }
            for name, info in known.programs.items()
        }  # fmt: skip
        maps = {
            name: {"entries": use.entries, "max_entries": use.max_entries, "memory_bytes": use.memory_bytes}
            for name, use in self.pins.uses().items()
        }
        return found | {
            "started": known.started, "version": known.version, "options": dict(known.options),
            "refused": dict(known.refused), "notes": dict(known.notes), "programs": programs, "maps": maps,
            "lost": self.losses(), "series_dropped": self.dropped, "coverage": self.coverage,
        }  # fmt: skip


def missed(statistics: Mapping[str, ProgramStatistics]) -> int:
    """Events that the kernel skipped, but for those of a program whose second copy sees what the first one missed."""
    alone = [name for name in statistics if f"{name}{AGAIN}" not in statistics and not name.endswith(AGAIN)]
    return sum(statistics[name].recursion_misses for name in alone)
