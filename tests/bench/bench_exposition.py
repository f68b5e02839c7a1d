# SPDX-License-Identifier: Apache-2.0
"""How long a page takes: `python tests/bench/bench_exposition.py`, from anywhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.exposition import Renderer
from daemon.model import Distribution, Exemplar, Family, Metric, Series

BOUNDS = tuple(2.0**power for power in range(-20, 6))
HISTOGRAM = Metric("bench_duration_seconds", "histogram", "Time.", ("device", "operation"), "seconds", BOUNDS)
COUNTER = Metric("bench_events", "counter", "Events.", ("family", "state", "kind"))
START = 1_700_000_000.0


def page(sample_lines: int, scrape: int) -> list[Family]:
    """Half of the lines are buckets and half are counters; each has an exemplar that is new in every scrape."""

    def exemplar() -> Exemplar:
        labels = (("pid", "12345"), ("comm", "postgres"), ("cgroup", "/system.slice/postgresql.service"))
        return Exemplar(labels, 0.0123456, START + scrape)

    def distribution(number: int) -> Distribution:
        cumulative = tuple((number + scrape) * (slot + 1) for slot in range(len(BOUNDS)))
        return Distribution(cumulative, cumulative[-1], 1.5 * scrape, {i: exemplar() for i in range(len(BOUNDS) + 1)})

    half = sample_lines // 2
    histograms = [
        Series((f"nvme{number}n1", "read"), distribution(number), START) for number in range(half // (len(BOUNDS) + 1))
    ]
    counters = [Series(("ipv4", str(number), "data"), number + scrape, START, exemplar()) for number in range(half)]
    return [Family(HISTOGRAM, histograms), Family(COUNTER, counters)]


def medians(sample_lines: int, scrapes: int) -> Iterator[tuple[str, float]]:
    """Milliseconds; the first scrape fills the memory and is a figure of its own."""
    for name, openmetrics in (("OpenMetrics with exemplars", True), ("text", False)):
        renderer = Renderer()
        times = []
        for scrape in range(scrapes + 1):
            families = page(sample_lines, scrape)
            begin = time.perf_counter()
            renderer.render(families, openmetrics)
            times.append((time.perf_counter() - begin) * 1000)
        yield f"{name}, first", times[0]
        yield name, statistics.median(times[1:])


if __name__ == "__main__":
    for sample_lines, scrapes in ((1_000, 101), (50_000, 11)):
        for name, milliseconds in medians(sample_lines, scrapes):
            print(f"{sample_lines:>6} lines  {name:<34} {milliseconds:8.2f} ms")
