# SPDX-License-Identifier: Apache-2.0
"""A host that is not there: what its collectors would say after some minutes, with a disk that may become slow."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

import collectors
from daemon.cards import View
from daemon.model import Distribution, Exemplar, Family, Metric, Series
from daemon.recent import Recent, read
from daemon.selfmetrics import LOST, RUN_TIME, RUNS

BEGAN, STEP = 1_700_000_000.0, 5.0
METRICS: dict[str, Metric] = {
    metric.name: metric
    for collector in collectors.ALL
    for metric in collector.metrics({option.name: option.default for option in collector.options})
}


@dataclass
class Times:
    """A histogram that grows. The last value is its exemplar."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float = 0.0
    last: float = 0.0

    def add(self, values: Iterable[float]) -> None:
        for one in values:
            self.counts[bisect_left(self.bounds, one)] += 1
            self.sum += one
            self.last = one

    def value(self, who: tuple[tuple[str, str], ...], when: float) -> Distribution:
        cumulative = tuple(accumulate(self.counts))
        exemplars = {bisect_left(self.bounds, self.last): Exemplar(who, self.last, when)}
        return Distribution(cumulative[:-1], cumulative[-1], self.sum, exemplars)


@dataclass
class Host:
    """`step()` lets five seconds pass; counts only grow."""

    comm: str = "postgres"
    disk: str = "sda"
    cgroup: str = "/system.slice/batch.service"
    lost: int = 0
    runs: dict[str, int] = field(default_factory=dict)  # of 250 ns each
    randomness: Random = field(default_factory=lambda: Random(1))
    seconds: float = 0.0
    times: dict[tuple[str, tuple[str, ...]], Times] = field(default_factory=dict)
    counts: dict[tuple[str, tuple[str, ...]], int] = field(default_factory=dict)

    def step(self, trouble: bool = False) -> None:
        self.seconds += STEP
        chance = self.randomness
        for device, operation, number, typical in (
            ("nvme0n1", "read", 160, 90e-6), ("nvme0n1", "write", 90, 28e-6), (self.disk, "write", 40, 700e-6),
        ):  # fmt: skip
            factor = 600 if trouble and device == self.disk else 1
            values = [factor * typical * chance.lognormvariate(0, 0.7) for _ in range(number)]
            self._observe("bpf_block_io_duration_seconds", (device, operation), values)
            self._observe("bpf_block_io_queue_duration_seconds", (device, operation), [one / 9 for one in values])
            sizes = [4096.0 * 2 ** (i % 5) for i in range(number)]
            self._observe("bpf_block_io_size_bytes", (device, operation), sizes)
        self._observe("bpf_run_queue_latency_seconds", (), [4e-6 * chance.lognormvariate(0, 1.4) for _ in range(900)])
        for direction in ("inbound", "outbound"):
            labels = ("ipv4", direction, "other")
            self._observe("bpf_tcp_connection_duration_seconds", labels,
                          [0.02 * chance.lognormvariate(0, 1.6) for _ in range(12)])  # fmt: skip
            self._observe("bpf_tcp_connection_sent_bytes", labels, [2000.0] * 12)
            self._observe("bpf_tcp_connection_received_bytes", labels, [500.0] * 12)
            self._count("bpf_tcp_connections_opened", labels, 12)
        accesses = chance.randint(30_000, 60_000)
        self._count("bpf_page_cache_accesses", (), accesses)
        self._count("bpf_page_cache_misses", (), accesses // chance.randint(20, 80))
        self._count("bpf_page_cache_added", (), accesses // 15)
        self._count("bpf_page_cache_dirtied", (), accesses // 40)
        self._count("bpf_tcp_retransmits", ("ipv4", "established", "data"), chance.randint(0, 3))
        for kind in ("probe", "syn", "synack"):
            self._count("bpf_tcp_retransmits", ("ipv4", "established", kind), 0)
        self._count("bpf_tcp_retransmit_failures", ("ipv4",), 0)

    def kill(self) -> None:
        self._count("bpf_oom_kills", ("memcg", self.cgroup), 1)

    def _observe(self, name: str, labels: tuple[str, ...], values: list[float]) -> None:
        bounds = METRICS[name].bounds
        self.times.setdefault((name, labels), Times(bounds, [0] * (len(bounds) + 1))).add(values)

    def _count(self, name: str, labels: tuple[str, ...], number: int) -> None:
        self.counts[name, labels] = self.counts.get((name, labels), 0) + number

    @property
    def wall(self) -> float:
        return BEGAN + self.seconds

    def families(self) -> list[Family]:
        series: dict[str, list[Series]] = {name: [] for name in METRICS}
        who = (("pid", "4242"), ("comm", self.comm))
        for (name, labels), times in self.times.items():
            series[name].append(Series(labels, times.value(who, self.wall - 2), BEGAN))
        for (name, labels), number in self.counts.items():
            example = Exemplar(who, 1, self.wall - 2)
            series[name].append(Series(labels, number, BEGAN, example if number else None))
        lost = Family(LOST, [Series(("biolatency", "map_full"), self.lost)])
        runs = Family(RUNS, [Series((name, "a"), number) for name, number in self.runs.items()])
        run_time = Family(RUN_TIME, [Series((name, "a"), 250e-9 * number) for name, number in self.runs.items()])
        return [*(Family(METRICS[name], found) for name, found in series.items()), lost, runs, run_time]


def view(host: Host, steps: int = 24, trouble: int = 0) -> View:
    """After so many steps of five seconds, of which the last ones were in trouble."""
    recent = Recent()
    for step in range(steps):
        host.step(trouble=step >= steps - trouble)
        recent.keep(read(host.families(), host.seconds, 10_000 + int(1000 * host.seconds)))
    now = recent.now(read(host.families(), host.seconds + 1.0, 10_000 + int(1000 * (host.seconds + 1))))
    return View(now, {one.metric.name: one for one in host.families()}, host.wall + 1)


def status(**changes: Any) -> dict[str, Any]:
    """What `/status` would answer, as far as the page reads it."""

    def one(*hooks: str, **more: Any) -> dict[str, Any]:
        programs = {hook: {"hook": f"tp_btf:{hook}", "fidelity": "exact", "reason": None} for hook in hooks}
        return {"up": True, "error": None, "programs": programs, "lost": {"map_full": 0}, "notes": {},
                "started": BEGAN - 7980} | more  # fmt: skip

    every = {
        "biolatency": one("block_rq_issue", "block_rq_complete"),
        "runqlat": one("sched_switch"),
        "tcpretrans": one("tcp_retransmit_skb", "tcp_retransmit_synack"),
        "cachestat": one("mm_filemap_get_pages", "mm_filemap_fault"),
        "oomkill": one("signal_generate", "mark_victim"),
        "tcplife": one("inet_sock_set_state"),
    }
    return {
        "version": "0.1.0", "kernel": "6.1.0", "ready": True, "reasons": [], "notes": [], "bpf_stats_enabled": True,
        "collectors": every,
    } | changes  # fmt: skip
