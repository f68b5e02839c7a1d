# SPDX-License-Identifier: Apache-2.0
"""What the page tells of each collector: a number in the field's terms, a picture, a table, who it was.

Text here is plain, also where a kernel or a process chose it; `page` escapes all of it, and `pictures` its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from daemon import pictures, recent, triage
from daemon.model import Distribution, Exemplar, Family
from daemon.recent import POINTS, Group, Now, Values
from daemon.words import age, amount, count, rate, share, who

ROWS = 6  # of a table; the most important ones
FRESH_SECONDS = 60  # an exemplar older than this is not told as of now
NOTHING = "–"

Row = tuple[str, ...]
Families = Mapping[str, Family]


@dataclass(frozen=True, slots=True)
class Card:
    """`picture` and `trail` are SVG, all else is text. `says` explains the figure, `caption` the picture."""

    title: str
    figure: str
    says: str
    picture: str
    caption: str
    trail: str = ""
    beside: str = ""
    table: tuple[Row, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """What a card is made of. `wall` is the time of day, in seconds since the epoch."""

    now: Now
    families: Families
    wall: float

    @property
    def values(self) -> Values:
        return self.now.change.values if self.now.change else {}

    def per_second(self, name: str) -> float:
        change = self.now.change
        return recent.total(change.values, name) / change.seconds if change else 0.0

    def minutes(self) -> str:
        """How far back the pictures go."""
        points = self.now.points
        step = (points[-1].at - points[0].at) / (len(points) - 1) if len(points) > 1 else 5.0
        return f"{max(1, round(step * POINTS / 60))} min"


def biolatency(view: View) -> Card:
    worst = triage.slowest(view.now)
    says = "hardly a request"
    if worst:
        says = f"p99, {' '.join(worst.group)}; since start {_time(worst.usual)}"
    bounds = view.now.reading.bounds[recent.DISK]
    seconds = view.now.change.seconds if view.now.change else 1.0
    rows = []
    for key, one in _slowest_first(recent.histograms(view.values, recent.DISK), bounds):
        rows.append((" ".join(key), rate(one.count / seconds), *_quantiles(bounds, one)))
    queue, sizes = (recent.whole(view.values, name) for name in (recent.QUEUE, recent.SIZE))
    remarks = [f"{amount(sizes.sum / seconds, 'bytes')}/s"] if sizes else []
    if queue:
        remarks.append(f"queued before that p99 {_time(_p99(view, recent.QUEUE, queue))}")
    return Card(
        title="Block I/O, device time",
        figure=_time(worst.p99) if worst else NOTHING,
        says=says,
        **_spectrum(view, recent.DISK, "seconds"),
        **_trail(view, "p99", [one.disk_p99 for one in view.now.points]),
        table=_table(("", "per s", "p50", "p99"), rows),
        remarks=(*_joined(remarks), *_errors(view), *_slow(view, recent.DISK)),
    )


def runqlat(view: View) -> Card:
    p99 = triage.waiting(view.now)
    usual = triage.usual_p99(view.now.reading, recent.WAIT)
    bounds = view.now.reading.bounds[recent.WAIT]
    seconds = view.now.change.seconds if view.now.change else 1.0
    waits = recent.whole(view.values, recent.WAIT)
    rows = [
        (key[0] or "/", rate(one.count / seconds), *_quantiles(bounds, one))
        for key, one in _slowest_first(recent.histograms(view.values, recent.WAIT, recent.ENOUGH), bounds)
        if key
    ]
    remarks = []
    if waits:
        tasks = waits.sum / seconds  # Little's law
        remarks = [f"{rate(waits.count / seconds)} waits", f"p50 {_time(_p50(view, recent.WAIT, waits))}",
                   f"{count(tasks)} tasks waiting on average"]  # fmt: skip
    return Card(
        title="Waits for a CPU",
        figure=NOTHING if p99 is None else _time(p99),
        says="nothing waited" if p99 is None or usual is None else f"p99; since start {_time(usual)}",
        **_spectrum(view, recent.WAIT, "seconds"),
        **_trail(view, "p99", [one.wait_p99 for one in view.now.points]),
        table=_table(("cgroup", "per s", "p50", "p99"), rows),
        remarks=(*_joined(remarks), *_slow(view, recent.WAIT)),
    )


def cachestat(view: View) -> Card:
    names = {"accesses": recent.ACCESSES, "misses": recent.MISSES, "added": recent.ADDED, "dirtied": recent.DIRTIED}
    per_second = {what: view.per_second(name) for what, name in names.items()}
    totals = {what: recent.total(view.now.reading.values, name) for what, name in names.items()}
    ratio = triage.hits(per_second["accesses"], per_second["misses"])
    ever = triage.hits(totals["accesses"], totals["misses"])
    points = view.now.points
    return Card(
        title="Page cache, hits",
        figure=NOTHING if ratio is None else share(ratio),
        says="nothing read" if ratio is None or ever is None else f"of accesses; since start {share(ever)}",
        picture=_history(view, "Accessed pages, and of these misses", [one.accesses for one in points],
                         [one.misses for one in points]),
        caption="accessed pages; misses in colour",
        table=_table(("pages", "per s", "since start"),
                     [(what, rate(per_second[what]), count(totals[what])) for what in names]),
    )  # fmt: skip


def oomkill(view: View) -> Card:
    kills = view.now.kills
    groups = recent.grouped(view.families[recent.KILLS], ("scope", "cgroup"))
    counted = sorted(((recent.size(one), key) for key, one in groups.items() if recent.size(one)), reverse=True)
    last = _newest(view, recent.KILLS)
    return Card(
        title="OOM kills",
        figure=count(kills),
        says=f"in {view.minutes()}; {count(sum(one for one, _ in counted))} since start",
        picture=_history(view, "OOM kills", [one.kills for one in view.now.points], (), whole=True),
        caption="kills",
        table=_table(("scope", "cgroup", "since start"), [(*key, count(one)) for one, key in counted]),
        remarks=(f"The last: {who(last.labels)}, {age(view.wall - last.timestamp)} ago.",) if last else (),
    )


def tcpretrans(view: View) -> Card:
    resent = triage.resent(view.now)
    kinds = recent.grouped(view.families[recent.RETRANSMITS], ("kind",))
    seconds = view.now.change.seconds if view.now.change else 1.0
    came = view.values.get(recent.RETRANSMITS, {})
    rows = [
        (*key, rate(recent.size(came.get(key, 0)) / seconds), count(recent.size(one))) for key, one in kinds.items()
    ]
    last = _newest(view, recent.RETRANSMITS)
    fresh = last if last and view.wall - last.timestamp < FRESH_SECONDS else None
    points = view.now.points
    return Card(
        title="TCP retransmits",
        figure=rate(view.per_second(recent.RETRANSMITS)) if view.now.change else NOTHING,
        says="segments sent again" if resent is None or resent > 1 else f"{share(resent)} of segments sent",
        picture=_history(view, "Retransmitted segments", [one.retransmits for one in points], ()),
        caption="segments sent again",
        table=_table(("kind", "per s", "since start"), rows),
        remarks=(f"The last: {who(fresh.labels)}.",) if fresh else (),
    )


def tcplife(view: View) -> Card:
    closed = recent.whole(view.values, recent.DURATION)
    directions = recent.grouped(view.families[recent.OPENED], ("direction",))
    seconds = view.now.change.seconds if view.now.change else 1.0
    rows = []
    for key in directions:
        opened = recent.size(view.values.get(recent.OPENED, {}).get(key, 0)) / seconds
        moved = [view.values.get(name, {}).get(key) for name in (recent.SENT, recent.RECEIVED)]
        bytes_each = [one.sum / seconds if isinstance(one, Distribution) else 0.0 for one in moved]
        rows.append((*key, rate(opened), *(f"{amount(one, 'bytes')}/s" for one in bytes_each)))
    remarks = []
    if closed:
        remarks = [f"{rate(closed.count / seconds)} closed", f"lived p50 {_time(_p50(view, recent.DURATION, closed))}"]
    return Card(
        title="TCP connections",
        figure=rate(view.per_second(recent.OPENED)) if view.now.change else NOTHING,
        says=f"opened; {count(sum(map(recent.size, directions.values())))} since start",
        **_spectrum(view, recent.DURATION, "seconds"),
        **_trail(view, "opened", [one.opened for one in view.now.points]),
        table=_table(("", "opened", "sent", "received"), rows),
        remarks=_joined(remarks),
    )


CARDS: Mapping[str, Callable[[View], Card]] = {
    "biolatency": biolatency,
    "runqlat": runqlat,
    "cachestat": cachestat,
    "oomkill": oomkill,
    "tcpretrans": tcpretrans,
    "tcplife": tcplife,
}


# What they share


def _spectrum(view: View, name: str, unit: str) -> dict[str, str]:
    came = recent.whole(view.values, name)
    metric = view.families[name].metric
    ever = recent.whole(view.now.reading.values, name) or Distribution((0,) * len(metric.bounds), 0, 0.0)
    mark = _p99(view, name, came) if came else None
    picture = pictures.spectrum(metric.help, unit, metric.bounds, came, ever, mark)
    events = f"{count(came.count)} in {view.now.change.seconds:.0f} s" if came and view.now.change else "none now"
    return {"picture": picture, "caption": f"{events}; outline: {count(ever.count)} since start"}


def _history(view: View, label: str, values: Sequence[float], parts: Sequence[float], whole: bool = False) -> str:
    return pictures.history(label, values, parts or [0.0] * len(values), f"{view.minutes()} ago", whole)


def _trail(view: View, what: str, values: Sequence[float | None]) -> dict[str, str]:
    most = max((one for one in values if one is not None), default=None)
    if most is None:
        return {}
    top = rate(most) if what == "opened" else _time(most)
    return {"trail": pictures.trail(f"{what}, the last {view.minutes()}", values),
            "beside": f"up to {top}"}  # fmt: skip


def _table(head: Row, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Nothing where there are no rows; of many the first ones, and how many there are beside them."""
    if not rows:
        return ()
    more = ((f"and {len(rows) - ROWS} more", *("" for _ in head[1:])),) if len(rows) > ROWS else ()
    return (head, *rows[:ROWS], *more)


def _joined(remarks: Iterable[str]) -> tuple[str, ...]:
    """What belongs together in one line."""
    line = ", ".join(remarks)
    return (line,) if line else ()


def _slowest_first(groups: Mapping[Group, Distribution], bounds: Sequence[float]) -> list[tuple[Group, Distribution]]:
    return sorted(groups.items(), key=lambda item: (-recent.quantile(0.99, bounds, item[1]), item[0]))


def _quantiles(bounds: Sequence[float], value: Distribution) -> tuple[str, str]:
    return _time(recent.quantile(0.5, bounds, value)), _time(recent.quantile(0.99, bounds, value))


def _p50(view: View, name: str, value: Distribution) -> float:
    return recent.quantile(0.5, view.now.reading.bounds[name], value)


def _p99(view: View, name: str, value: Distribution) -> float:
    return recent.quantile(0.99, view.now.reading.bounds[name], value)


def _time(seconds: float) -> str:
    return amount(seconds, "seconds")


def _errors(view: View) -> Iterable[str]:
    groups = recent.grouped(view.families[recent.ERRORS], ("device", "operation", "error"))
    counted = [(key, recent.size(one)) for key, one in groups.items() if recent.size(one)]
    if counted:
        each = ", ".join(f"{' '.join(key)} {count(one)}" for key, one in counted[:ROWS])
        yield f"Failed since start: {each}"


def _exemplars(view: View, name: str) -> Iterable[Exemplar]:
    for series in view.families[name].series:
        if isinstance(series.value, Distribution):
            yield from series.value.exemplars.values()
        elif series.exemplar:
            yield series.exemplar


def _newest(view: View, name: str) -> Exemplar | None:
    return max(_exemplars(view, name), key=lambda one: one.timestamp, default=None)


def _slow(view: View, name: str) -> Iterable[str]:
    """Whom the longest wait of the last minute met, of those that the kernel kept as examples."""
    fresh = [one for one in _exemplars(view, name) if view.wall - one.timestamp < FRESH_SECONDS]
    if fresh:
        one = max(fresh, key=lambda found: found.value)
        yield f"Example: {_time(one.value)}, {who(one.labels)}, {age(view.wall - one.timestamp)} ago"
