# SPDX-License-Identifier: Apache-2.0
"""The recent past, for the page: what came in the last seconds, and how the last minutes went.

Every count is kept since counting began, so the present is a difference of two readings. A few readings of the last
seconds stay, of the labels that the page shows and no others, and of the minutes before them only a point for each
step: the server has no room for more, and Prometheus has the past.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import sub
from typing import NamedTuple

from collectors.decoders import OTHER
from daemon.model import Distribution, Family

Group = tuple[str, ...]
Value = float | Distribution
Values = Mapping[str, Mapping[Group, Value]]

STEP_SECONDS = 4.5  # readings come every 5 s, some a little early
WINDOW_SECONDS = 9.5
READINGS = 4  # so that one of them is older than the window
POINTS = 60
MOST_GROUPS = 256  # a family of more label sets is kept as one sum
ENOUGH = 10  # events that a quantile of a step needs

DISK, QUEUE, SIZE = "bpf_block_io_duration_seconds", "bpf_block_io_queue_duration_seconds", "bpf_block_io_size_bytes"
ERRORS = "bpf_block_io_errors"
WAIT = "bpf_run_queue_latency_seconds"
RETRANSMITS, FAILURES = "bpf_tcp_retransmits", "bpf_tcp_retransmit_failures"
ACCESSES, MISSES = "bpf_page_cache_accesses", "bpf_page_cache_misses"
ADDED, DIRTIED = "bpf_page_cache_added", "bpf_page_cache_dirtied"
KILLS = "bpf_oom_kills"
DURATION, OPENED = "bpf_tcp_connection_duration_seconds", "bpf_tcp_connections_opened"
SENT, RECEIVED = "bpf_tcp_connection_sent_bytes", "bpf_tcp_connection_received_bytes"
LOST, RUNS, RUN_TIME = "bpfmetricsd_events_lost", "bpfmetricsd_program_runs", "bpfmetricsd_program_run_seconds"

# The labels by which each family is kept; others are added up. A label that a family does not have counts as absent.
KEPT: Mapping[str, tuple[str, ...]] = {
    DISK: ("device", "operation"), QUEUE: (), SIZE: (), ERRORS: ("device", "operation", "error"),
    WAIT: ("cgroup",),
    RETRANSMITS: ("kind",), FAILURES: (),
    ACCESSES: (), MISSES: (), ADDED: (), DIRTIED: (),
    KILLS: ("scope", "cgroup"),
    DURATION: ("direction",), OPENED: ("direction",), SENT: ("direction",), RECEIVED: ("direction",),
    LOST: ("collector", "reason"), RUNS: ("collector",), RUN_TIME: ("collector",),
}  # fmt: skip
# What a disk does not support, or asks to be sent again, is no fault of it; config/rules/recording.yaml says the same.
_NO_FAULT = ("notsupp", "eopnotsupp", "enotsupp", "again", "eagain")
SEGMENTS = "segments"  # TCP segments that this network namespace sent: OutSegs of /proc/net/snmp


@dataclass(frozen=True, slots=True)
class Reading:
    """Counts since they began. `at` is a moment of the monotonic clock in seconds; `bounds` those of histograms."""

    at: float
    values: Values
    bounds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """What came within some seconds."""

    seconds: float
    values: Values


class Point(NamedTuple):
    """A step of the past. Times in seconds, None where too little came; the rest is per second, but for `kills` and
    `errors`, which are whole."""

    at: float
    disk_p99: float | None
    wait_p99: float | None
    accesses: float
    misses: float
    kills: float
    errors: float
    retransmits: float
    opened: float


def plus(values: Iterable[Value]) -> Value:
    """All together, without exemplars. Values of one metric are of one kind."""
    every = list(values)
    histograms = [one for one in every if isinstance(one, Distribution)]
    if histograms:
        columns = zip(*(one.cumulative for one in histograms), strict=True)
        totals = tuple(map(sum, columns))
        return Distribution(totals, sum(one.count for one in histograms), sum(one.sum for one in histograms))
    return sum(one for one in every if not isinstance(one, Distribution))


def grouped(family: Family, labels: Sequence[str]) -> dict[Group, Value]:
    """The family's values, added up over all labels but these; a label that it does not have counts as absent."""
    places = [family.metric.labels.index(label) for label in labels if label in family.metric.labels]
    groups: dict[Group, list[Value]] = {}
    for series in family.series:
        groups.setdefault(tuple(series.labels[place] for place in places), []).append(series.value)
    return {key: plus(values) for key, values in groups.items()}


def read(families: Iterable[Family], at: float, segments: int | None = None) -> Reading:
    """What the page needs of one collection."""
    values: dict[str, Mapping[Group, Value]] = {} if segments is None else {SEGMENTS: {(): segments}}
    bounds = {}
    for family in families:
        name = family.metric.name
        if name in KEPT:
            found = grouped(family, KEPT[name])
            values[name] = found if len(found) <= MOST_GROUPS else {(): plus(found.values())}
            bounds[name] = family.metric.bounds
    return Reading(at, values, bounds)


def out_segments(snmp: str) -> int | None:
    """OutSegs of /proc/net/snmp: a line of names, and below it one of numbers."""
    lines = [line.split() for line in snmp.splitlines() if line.startswith("Tcp:")]
    found = dict(zip(*lines, strict=False)) if len(lines) == 2 else {}
    return int(found["OutSegs"]) if "OutSegs" in found else None


def since(new: Reading, old: Reading) -> Change:
    """What came in between, of the families that both have. Counts that fell began again, and count whole."""
    values = {
        name: _between(groups, old.values[name]) for name, groups in new.values.items() if name in old.values
    }  # fmt: skip
    return Change(new.at - old.at, values)


def _between(new: Mapping[Group, Value], old: Mapping[Group, Value]) -> dict[Group, Value]:
    """The counts of a cgroup that is gone go on in `other`: they did not come now."""
    gone = [value for key, value in old.items() if key not in new]
    found = {}
    for key, value in new.items():
        before = old.get(key)
        if gone and key and set(key) == {OTHER}:
            both = plus([*gone, *([] if before is None else [before])])
            before = both if size(both) <= size(value) else before
        found[key] = _minus(value, before)
    return found


def size(value: Value) -> float:
    return value.count if isinstance(value, Distribution) else value


def _minus(new: Value, old: Value | None) -> Value:
    if isinstance(new, Distribution):
        if not isinstance(old, Distribution) or old.count > new.count:
            return new
        cumulative = tuple(map(sub, new.cumulative, old.cumulative))
        return Distribution(cumulative, new.count - old.count, max(0.0, new.sum - old.sum))
    return new if old is None or isinstance(old, Distribution) or old > new else new - old


def total(values: Values, name: str) -> float:
    """Of a counter, over all its groups."""
    return size(plus(values.get(name, {}).values()))


def whole(values: Values, name: str) -> Distribution | None:
    """Of a histogram, over all its groups; None where nothing was counted."""
    found = plus(values.get(name, {}).values())
    return found if isinstance(found, Distribution) and found.count else None


def quantile(share: float, bounds: Sequence[float], value: Distribution) -> float:
    """Linear within a bucket, as Prometheus' `histogram_quantile`; infinite above the last bound. Needs a count."""
    rank = share * value.count
    below, low = 0, 0.0
    for bound, cumulative in zip(bounds, value.cumulative, strict=True):
        if cumulative >= rank and cumulative > below:
            return low + (bound - low) * (rank - below) / (cumulative - below)
        below, low = cumulative, bound
    return float("inf")


def histograms(values: Values, name: str, enough: int = 1) -> dict[Group, Distribution]:
    """The groups that have counted so much."""
    groups = values.get(name, {}).items()
    return {key: one for key, one in groups if isinstance(one, Distribution) and one.count >= enough}


def faults(values: Values) -> float:
    """Failed requests, but for what a disk does not support and what is sent again."""
    groups = values.get(ERRORS, {}).items()
    return sum(one for key, one in groups if not isinstance(one, Distribution) and key[-1] not in _NO_FAULT)


def _p99(bounds: Sequence[float], value: Distribution) -> float:
    """For a line of finite length: what is above all bounds is at twice the last one."""
    return min(quantile(0.99, bounds, value), 2 * bounds[-1])


def point(at: float, change: Change, bounds: Mapping[str, Sequence[float]]) -> Point:
    """The 99th percentile of disks is that of the slowest disk and operation, but for discards."""
    values = change.values
    groups = histograms(values, DISK, ENOUGH).items()
    slow = [_p99(bounds[DISK], one) for key, one in groups if key[-1:] != ("discard",)]
    waits = whole(values, WAIT)
    per_second = {
        name: total(values, name) / change.seconds for name in (ACCESSES, MISSES, RETRANSMITS, OPENED)
    }  # fmt: skip
    return Point(
        at=at,
        disk_p99=max(slow, default=None),
        wait_p99=_p99(bounds[WAIT], waits) if waits and waits.count >= ENOUGH else None,
        accesses=per_second[ACCESSES],
        misses=per_second[MISSES],
        kills=total(values, KILLS),
        errors=faults(values),
        retransmits=per_second[RETRANSMITS],
        opened=per_second[OPENED],
    )


@dataclass(frozen=True, slots=True)
class Now:
    """What the page is made of. `change` is None until there are two readings; `points` are the minutes before."""

    reading: Reading
    change: Change | None = None
    points: Sequence[Point] = ()
    tail: Point | None = None  # what came after the last point

    @property
    def kills(self) -> float:
        return sum(one.kills for one in self._steps())

    @property
    def errors(self) -> float:
        return sum(one.errors for one in self._steps())

    def _steps(self) -> tuple[Point, ...]:
        return (*self.points, *((self.tail,) if self.tail else ()))


class Recent:
    """The readings of the last seconds and the points of the last minutes; bounded."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque(maxlen=READINGS)
        self._points: deque[Point] = deque(maxlen=POINTS)

    def due(self, at: float) -> bool:
        return not self._readings or at - self._readings[-1].at >= STEP_SECONDS

    def keep(self, reading: Reading) -> None:
        if self._readings:
            change = since(reading, self._readings[-1])
            self._points.append(point(reading.at, change, reading.bounds))
        self._readings.append(reading)

    def now(self, reading: Reading) -> Now:
        """`reading` is the newest, and need not be kept."""
        before = [one for one in self._readings if one.at < reading.at]
        if not before:
            return Now(reading, None, tuple(self._points))
        old = next((one for one in reversed(before) if reading.at - one.at >= WINDOW_SECONDS), before[0])
        newest = before[-1] is self._readings[-1]
        tail = point(reading.at, since(reading, before[-1]), reading.bounds) if newest else None
        return Now(reading, since(reading, old), tuple(self._points), tail)
