# SPDX-License-Identifier: Apache-2.0
"""`bpfmetricsd show`: a collector in the terminal, as the bcc tool of the same name prints it.

Families in, lines out; only `watch` sleeps and prints. Histograms look as bcc's `print_log2_hist` prints them. Bounds
are powers of two of a second here, not of a microsecond, so the labels are those bounds, rounded: `0.95 -> 1.9`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from daemon import histogram
from daemon.errors import UsageError
from daemon.journal import escaped
from daemon.model import Distribution, Exemplar, Family, Metric, Series
from daemon.recent import Group, grouped
from daemon.words import who

STARS = 40
_MILLISECONDS_FROM = 2.0**-10
_PAGES = "bpf_page_cache_"
_CACHESTAT = ("accesses", "misses", "dirtied", "added")
_CACHESTAT_COLUMNS = {
    "HITS": 8, "MISSES": 8, "DIRTIES": 8, "HITRATIO": 8, "BUFFERS_MB": 12, "CACHED_MB": 10, "ADDED": 8,
}  # fmt: skip

Bold = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class View:
    """How to print. `by` gives each value of a label a histogram of its own; `seconds` is None for since it began."""

    by: str | None = None
    seconds: float | None = None
    bold: Bold = str


@dataclass(frozen=True, slots=True)
class Scale:
    """The unit of a histogram's rows, how many a base unit has, and the bound below which empty rows go unsaid."""

    name: str
    per_base: float
    whole: bool = False
    floor: float = 0.0

    def edge(self, bound: float) -> str:
        value = bound * self.per_base
        return f"{value:.0f}" if self.whole or value >= 10 else f"{value:.2g}"

    def above(self, bound: float) -> str:
        """The row's low end: buckets are exclusive there, and of whole bytes the next one is the first."""
        return self.edge(bound + 1) if self.whole else self.edge(bound)


def scale(metric: Metric, total: Distribution) -> Scale:
    """Milliseconds where nothing was ever faster than one; else microseconds."""
    if metric.unit != "seconds":
        first = next((bound for bound, n in zip(metric.bounds, total.cumulative, strict=True) if n), 0.0)
        return Scale(metric.unit or "value", 1, whole=True, floor=first)
    fast = any(n and bound <= _MILLISECONDS_FROM for bound, n in zip(metric.bounds, total.cumulative, strict=True))
    return Scale("usecs", 1e6) if fast else Scale("msecs", 1e3, floor=_MILLISECONDS_FROM)


def bars(metric: Metric, value: Distribution, unit: Scale) -> list[str]:
    """bcc's picture, up to the last row that is not empty; the last row of all is what is above every bound."""
    counts = histogram.buckets(value)
    rows = zip((*metric.bounds, float("inf")), counts, strict=True)
    kept = [(bound, n) for bound, n in rows if bound >= unit.floor or n]
    last = max((i for i, (_, n) in enumerate(kept) if n), default=-1)
    most = max(counts)
    lines = [f"     {unit.name:<19} : count     distribution"]
    low = unit.above(max((bound for bound in metric.bounds if bound < unit.floor), default=-1.0)) if unit.whole else "0"
    for bound, n in kept[: last + 1]:
        high = "+Inf" if bound == float("inf") else unit.edge(bound)
        lines.append(f"{low:>10} -> {high:<10} : {n:<8d} |{'*' * (STARS * n // most):<{STARS}}|")
        low = unit.above(bound)
    total = value.sum * unit.per_base
    mean = f"avg = {unit.edge(value.sum / value.count)} {unit.name}"
    return [*lines, "", f"{mean}, total: {total:.0f} {unit.name}, count: {value.count}"]


def _number(value: float | Distribution) -> float:
    if isinstance(value, Distribution):
        raise TypeError("a histogram among counters")
    return value


def difference(after: Sequence[Family], before: Sequence[Family]) -> list[Family]:
    """What came in between. A series that began again in the meantime counts whole."""
    known = {(family.metric.name, one.labels): one for family in before for one in family.series}
    return [
        replace(family, series=[_series(one, known.get((family.metric.name, one.labels))) for one in family.series])
        for family in after
    ]


def _series(after: Series, before: Series | None) -> Series:
    if before is None or before.created != after.created:
        return after
    new, old = after.value, before.value
    if isinstance(new, Distribution) and isinstance(old, Distribution):
        cumulative = tuple(a - b for a, b in zip(new.cumulative, old.cumulative, strict=True))
        return replace(after, value=Distribution(cumulative, new.count - old.count, new.sum - old.sum))
    return replace(after, value=_number(new) - _number(old))


def render(shown: Sequence[Family], totals: Sequence[Family], view: View) -> list[str]:
    """The families that counted, each below a title where there may be several. `totals`, since the beginning, set the
    units."""
    check_label(shown, view.by)
    every = {family.metric.name: family for family in totals}
    lines: list[str] = []
    for family in shown:
        whole = every.get(family.metric.name, family)
        counted = _histograms(family, whole, view) if family.metric.type == "histogram" else table(family, view)
        if counted:
            lines += ["", view.bold(family.metric.help)] if len(shown) > 1 else []
            lines += counted
    return lines or ["     nothing counted"]


def check_label(families: Iterable[Family], by: str | None) -> None:
    known = sorted({label for family in families for label in family.metric.labels})
    if by is not None and by not in known:
        labels = f"known: {', '.join(known)}" if known else "this collector has none as it is configured"
        raise UsageError(f"--by {by}: no such label; {labels}")


def _histograms(family: Family, totals: Family, view: View) -> list[str]:
    labels = (view.by,) if view.by in family.metric.labels and view.by else ()
    whole = grouped(totals, ()).get(())
    unit = scale(family.metric, whole) if isinstance(whole, Distribution) else None
    lines = []
    for key, value in sorted(grouped(family, labels).items()):
        if unit and isinstance(value, Distribution) and value.count:
            lines += ["", f"{view.by} = {escaped(key[0])}"] if key else []
            lines += bars(family.metric, value, unit)
    return lines


def table(family: Family, view: View) -> list[str]:
    """A counter: its labels and what is not zero, the most first; whom the last of each met, where that is known."""
    labels = (view.by,) if view.by in family.metric.labels and view.by else family.metric.labels
    groups = grouped(family, labels).items()
    counted = [(key, value) for key, value in groups if isinstance(value, (int, float)) and value]
    if not counted:
        return []
    last = _last(family, labels)
    rows = [[label.upper() for label in labels] + ["COUNT"] + ["PER_SECOND"] * (view.seconds is not None)]
    counted.sort(key=lambda one: (-one[1], one[0]))
    for key, value in counted:
        rate = [f"{value / view.seconds:.1f}"] if view.seconds else []
        rows.append([*map(escaped, key), f"{value:.0f}", *rate])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = len(labels)
    lines = [
        "  ".join(f"{cell:<{width}}" if i < numbers else f"{cell:>{width}}"
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    if not last:
        return lines
    ends = ["LAST", *(last.get(key, "") for key, _ in counted)]
    return [f"{line}  {end}".rstrip() for line, end in zip(lines, ends, strict=True)]


def _last(family: Family, labels: Sequence[str]) -> dict[Group, str]:
    """Of each group, who the newest exemplar tells of."""
    places = [family.metric.labels.index(label) for label in labels]
    newest: dict[Group, Exemplar] = {}
    for series in family.series:
        key = tuple(series.labels[place] for place in places)
        if series.exemplar and (key not in newest or newest[key].timestamp < series.exemplar.timestamp):
            newest[key] = series.exemplar
    return {key: escaped(who(one.labels)) for key, one in newest.items()}


def cachestat_header(timed: bool) -> str:
    return f"{'TIME':<9}" * timed + " ".join(f"{name:>{width}}" for name, width in _CACHESTAT_COLUMNS.items())


def cachestat(families: Iterable[Family], meminfo: str, now: str = "") -> str:
    """bcc's cachestat line, in pages, with the pages added at its end. `meminfo` is the text of /proc/meminfo."""
    sums = {family.metric.name: _number(grouped(family, ()).get((), 0)) for family in families}
    accesses, misses, dirties, added = (sums.get(f"{_PAGES}{name}", 0) for name in _CACHESTAT)
    hits = max(0, accesses - misses)
    ratio = f"{100 * hits / accesses if accesses else 0:.2f}%"
    memory = _meminfo_mb(meminfo)
    cells = (hits, misses, dirties, ratio, f"{memory['Buffers']:.0f}", f"{memory['Cached']:.0f}", added)
    widths = _CACHESTAT_COLUMNS.values()
    return f"{now:<9}" * bool(now) + " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _meminfo_mb(text: str) -> dict[str, float]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: int(rest.split()[0]) / 1024 for key, _, rest in pairs if rest.split()}


def watch(read: Callable[[], Sequence[Family]], view: View, count: int | None, say: Callable[[str], None]) -> None:
    """Prints once what was counted since the beginning, or with `view.seconds` what came in each interval."""
    totals = read()
    check_label(totals, view.by)
    pages = bool(totals) and totals[0].metric.name.startswith(_PAGES)
    if pages:
        say(view.bold(cachestat_header(timed=view.seconds is not None)))
    if view.seconds is None:
        say(cachestat(totals, _meminfo()) if pages else f"{_since(totals)}{_text(totals, totals, view)}")
        return
    due = time.monotonic()
    while count is None or count > 0:
        due += view.seconds
        time.sleep(max(0.0, due - time.monotonic()))
        before, totals = totals, read()
        came, now = difference(totals, before), time.strftime("%H:%M:%S")
        say(cachestat(came, _meminfo(), now) if pages else f"\n{now}\n{_text(came, totals, view)}")
        count = None if count is None else count - 1


def _text(shown: Sequence[Family], totals: Sequence[Family], view: View) -> str:
    return "\n".join(render(shown, totals, view))


def _since(families: Iterable[Family]) -> str:
    began = min((one.created for family in families for one in family.series if one.created), default=None)
    return f"Since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(began))}\n" if began else ""


def _meminfo() -> str:
    return Path("/proc/meminfo").read_text()
