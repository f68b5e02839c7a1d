# SPDX-License-Identifier: Apache-2.0
"""Which of disk, CPU, memory and network hurts, by the last seconds and minutes.

The bounds are those of config/rules/alerting.yaml where it has one. What is usual there is the median of a day; here it
is all since counting began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from daemon import recent
from daemon.model import Distribution
from daemon.recent import Group, Now, Reading
from daemon.words import amount, count, rate, share

RESOURCES: Mapping[str, tuple[str, ...]] = {
    "Disk": ("biolatency",),
    "CPU": ("runqlat",),
    "Memory": ("cachestat", "oomkill"),
    "Network": ("tcpretrans", "tcplife"),
}

DISK_SECONDS, DISK_TIMES = 0.02, 4  # slow: both longer than this and so many times the usual,
DISK_ALWAYS = 0.25  # or so long that it is slow whatever is usual
WAIT_SECONDS = 0.03125
HIT_SHARE, MISS_RATE = 0.8, 1000
RETRANSMIT_SHARE, RETRANSMIT_FEW, RETRANSMIT_MANY = 0.03, 1, 100


@dataclass(frozen=True, slots=True)
class Finding:
    """How a resource is, in a word, and by what sign. `sentence` says it where it is bad, `collector` who saw it."""

    word: str
    sign: str
    sentence: str = ""
    collector: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.sentence)


@dataclass(frozen=True, slots=True)
class Slowest:
    """The disk and operation whose requests took the longest. Seconds; `usual` is since counting began."""

    group: Group
    p99: float
    usual: float

    @property
    def slow(self) -> bool:
        unusual = self.p99 > DISK_SECONDS and self.p99 > DISK_TIMES * self.usual
        return unusual or self.p99 > DISK_ALWAYS


def triage(now: Now, up: Mapping[str, bool]) -> dict[str, Finding]:
    """A finding for each resource. `up` tells which collectors there are, and count."""
    judges = {"Disk": disk, "CPU": cpu, "Memory": memory, "Network": network}
    return {name: _finding(now, judges[name](now), [up.get(one) for one in RESOURCES[name]]) for name in RESOURCES}


def _finding(now: Now, found: Finding, up: Iterable[bool | None]) -> Finding:
    """What is bad is said also when half of the collectors are down."""
    states = list(up)
    if found.bad or any(states):
        return found if found.bad or now.change else Finding("…", "first reading")
    return Finding("unknown", "its collectors are down" if False in states else "not configured")


def slowest(now: Now) -> Slowest | None:
    """Among those that were asked often enough for a 99th percentile, and that somebody waits for."""
    if not now.change:
        return None
    bounds = now.reading.bounds.get(recent.DISK, ())
    usual = recent.histograms(now.reading.values, recent.DISK)
    found = [
        Slowest(key, recent.quantile(0.99, bounds, one), recent.quantile(0.99, bounds, usual[key]))
        for key, one in recent.histograms(now.change.values, recent.DISK, recent.ENOUGH).items()
        if key[-1:] != ("discard",)
    ]
    return max(found, key=lambda one: (one.slow, one.p99), default=None)


def disk(now: Now) -> Finding:
    if now.errors:
        return Finding("failing", f"{count(now.errors)} failed requests", "A disk fails requests.", "biolatency")
    found = slowest(now)
    if found is None:
        return Finding("idle", "hardly a request")
    sign = f"{' '.join(found.group)} p99 {amount(found.p99, 'seconds')}"
    if found.slow:
        usually = f", since start {amount(found.usual, 'seconds')}" if DISK_TIMES * found.usual < found.p99 else ""
        return Finding("slow", f"{sign}{usually}", "A disk is slow.", "biolatency")
    return Finding("fine", sign)


def waiting(now: Now) -> float | None:
    """The 99th percentile of waits for a CPU, in seconds."""
    found = recent.whole(now.change.values, recent.WAIT) if now.change else None
    return recent.quantile(0.99, now.reading.bounds[recent.WAIT], found) if found else None


def cpu(now: Now) -> Finding:
    p99 = waiting(now)
    if p99 is None:
        return Finding("idle", "nothing waited")
    sign = f"waits p99 {amount(p99, 'seconds')}"
    if p99 > WAIT_SECONDS:
        return Finding("saturated", sign, "Tasks wait long for a CPU.", "runqlat")
    return Finding("fine", sign)


def hits(accesses: float, misses: float) -> float | None:
    """The share of accesses that found their page in the cache."""
    return max(0.0, 1 - misses / accesses) if accesses else None


def memory(now: Now) -> Finding:
    if now.kills:
        sign = f"{count(now.kills)} OOM kill{'s' if now.kills > 1 else ''}"
        return Finding("ran out", sign, "Memory ran out.", "oomkill")
    if not now.change or (ratio := _hits(now.change.values)) is None:
        return Finding("idle", "nothing read")
    sign = f"{share(ratio)} cache hits"
    misses = recent.total(now.change.values, recent.MISSES) / now.change.seconds
    usual = _hits(now.reading.values) or 0.0
    if misses > MISS_RATE and ratio < HIT_SHARE * usual:
        sentence = "What is read is no longer in the page cache."
        return Finding("misses", f"{sign}, since start {share(usual)}", sentence, "cachestat")
    return Finding("fine", sign)


def _hits(values: recent.Values) -> float | None:
    return hits(recent.total(values, recent.ACCESSES), recent.total(values, recent.MISSES))


def resent(now: Now) -> float | None:
    """Retransmitted segments for each that this network namespace sent; None where that is not known."""
    if not now.change or not (segments := recent.total(now.change.values, recent.SEGMENTS)):
        return None
    return recent.total(now.change.values, recent.RETRANSMITS) / segments


def network(now: Now) -> Finding:
    if not now.change:
        return Finding("idle", "no reading yet")
    per_second = recent.total(now.change.values, recent.RETRANSMITS) / now.change.seconds
    sign = f"{rate(per_second)} retransmits"
    ratio = resent(now)
    many = per_second > RETRANSMIT_MANY if ratio is None else per_second > RETRANSMIT_FEW and ratio > RETRANSMIT_SHARE
    if many:
        return Finding("losing", sign, "TCP loses segments.", "tcpretrans")
    return Finding("fine", sign)


def usual_p99(reading: Reading, name: str) -> float | None:
    """Since counting began, over all groups."""
    found: Distribution | None = recent.whole(reading.values, name)
    return recent.quantile(0.99, reading.bounds[name], found) if found else None
