# SPDX-License-Identifier: Apache-2.0
"""The daemon's own metrics: health and cost of each collector, and `process_*` as prometheus-client counts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal

from daemon import __version__, lean
from daemon.model import Family, Metric, Series
from daemon.unit import Unit

if TYPE_CHECKING:
    import prometheus_client.metrics_core
    from prometheus_client.process_collector import ProcessCollector

_UNITS = ("bytes", "seconds")


def process_families(collector: ProcessCollector | None = None) -> list[Family]:
    """CPU time, memory, file descriptors and start time of this process; what `/proc` does not tell is left out."""
    return [_family(metric) for metric in (collector or _own_process()).collect()]


@cache
def _own_process() -> ProcessCollector:
    undo = lean.bare("prometheus_client", "python3-prometheus-client")
    try:
        from prometheus_client.process_collector import ProcessCollector
        from prometheus_client.registry import CollectorRegistry

        return ProcessCollector(registry=CollectorRegistry())
    finally:
        undo()


def _family(metric: prometheus_client.metrics_core.Metric) -> Family:
    kind: Literal["counter", "gauge"] = "counter" if metric.type == "counter" else "gauge"
    unit = metric.name.rpartition("_")[2]
    ours = Metric(metric.name, kind, metric.documentation, unit=unit if unit in _UNITS else "")
    return Family(ours, [Series((), sample.value) for sample in metric.samples])


def _gauge(name: str, help: str, *labels: str, unit: str = "") -> Metric:
    return Metric(f"bpfmetricsd_{name}", "gauge", help, labels, unit)


def _counter(name: str, help: str, *labels: str, unit: str = "") -> Metric:
    return Metric(f"bpfmetricsd_{name}", "counter", help, labels, unit)


BUILD = Metric(
    "bpfmetricsd_build",
    "info",
    "Versions of the daemon, of the bcc that compiled the programs, of the kernel.",
    ("version", "bcc", "kernel"),
)
UP = _gauge("collector_up", "Whether the collector's programs are attached and its maps can be read.", "collector")
HOOK = Metric("bpfmetricsd_collector_hook", "info", "Where each program is attached, and whether its count is exact.",
              ("collector", "program", "hook", "fidelity"))  # fmt: skip
STARTED = _gauge(
    "collector_started_timestamp_seconds", "When counting into the present maps began.", "collector", unit="seconds"
)
READING = _gauge(
    "collector_read_duration_seconds", "What the last reading of the maps took.", "collector", unit="seconds"
)
ENTRIES = _gauge("map_entries", "Entries in a map; maps that are always full are left out.", "collector", "map")
ROOM = _gauge("map_max_entries", "Entries that a map can hold.", "collector", "map")
MEMORY = _gauge("map_memory_bytes", "Kernel memory that a map takes.", "collector", "map", unit="bytes")
LOST = _counter("events_lost", "Events that were not counted or not told, by reason.", "collector", "reason")
DROPPED = _counter("series_dropped", "Label sets over max_series, added to the series 'other'.", "collector")
COVERAGE = _gauge(
    "coverage_ratio", "Events counted here by the kernel's own count of the same, since counting began.", "collector"
)
RUNS = _counter("program_runs", "Runs of a program, while kernel.bpf_stats_enabled is 1.", "collector", "program")
RUN_TIME = _counter("program_run_seconds", "Time in a program, while kernel.bpf_stats_enabled is 1.",
                    "collector", "program", unit="seconds")  # fmt: skip

Value = float | int
Rows = Iterable[tuple[tuple[str, ...], Value]]


def families(units: Mapping[str, Unit]) -> list[Family]:
    """All of the daemon's own metrics, in a stable order."""
    loaded = {name: unit for name, unit in units.items() if unit.pins}

    def family(metric: Metric, rows: Callable[[str, Unit], Rows], of: Mapping[str, Unit] = loaded) -> Family:
        return Family(
            metric, [Series((name, *labels), value) for name, unit in of.items() for labels, value in rows(name, unit)]
        )

    bcc = next((unit.pins.manifest.bcc for unit in loaded.values() if unit.pins), "")
    return [
        Family(BUILD, [Series((__version__, bcc, os.uname().release), 1)]),
        family(UP, lambda _, unit: [((), int(unit.up))], units),
        family(HOOK, lambda _, unit: _hooks(unit)),
        family(STARTED, lambda _, unit: [((), unit.pins.manifest.started)] if unit.pins else []),
        family(READING, lambda _, unit: [((), unit.reading_s)], units),
        *_map_families(loaded),
        family(LOST, lambda _, unit: [((reason,), count) for reason, count in unit.losses().items()]),
        family(DROPPED, lambda _, unit: [((), unit.dropped)]),
        family(COVERAGE, lambda _, unit: [] if unit.coverage is None else [((), unit.coverage)]),
        *_run_families(loaded),
        *process_families(),
    ]


def _hooks(unit: Unit) -> Rows:
    programs = unit.pins.manifest.programs if unit.pins else {}
    return [((name, info.hook, info.fidelity), 1) for name, info in programs.items()]


def _map_families(loaded: Mapping[str, Unit]) -> list[Family]:
    uses = [(name, one, use) for name, unit in loaded.items() if unit.pins for one, use in unit.pins.uses().items()]
    return [
        Family(ENTRIES, [Series((name, one), use.entries) for name, one, use in uses if use.entries is not None]),
        Family(ROOM, [Series((name, one), use.max_entries) for name, one, use in uses]),
        Family(MEMORY, [Series((name, one), use.memory_bytes) for name, one, use in uses]),
    ]


def _run_families(loaded: Mapping[str, Unit]) -> list[Family]:
    runs = [
        (name, program, one)
        for name, unit in loaded.items() if unit.pins
        for program, one in unit.pins.statistics().items()
    ]  # fmt: skip
    return [
        Family(RUNS, [Series((name, program), one.runs) for name, program, one in runs]),
        Family(RUN_TIME, [Series((name, program), one.run_time_ns / 1e9) for name, program, one in runs]),
    ]
