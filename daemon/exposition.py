# SPDX-License-Identifier: Apache-2.0
"""From families to the text of `/metrics`: OpenMetrics 1.0 and the Prometheus text format 0.0.4.

Every scrape passes here, so what does not change between scrapes (metadata, names, escaped labels, bucket bounds) is
formatted once and kept. Both formats share it: their sample lines differ only in exemplars and `_created`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from daemon.model import EXEMPLAR_LABELS_MAX, Distribution, Exemplar, Family, Metric, Series

_SAMPLE_SUFFIX = {"counter": "_total", "gauge": "", "histogram": "", "info": "_info"}
_SPECIAL_FLOATS = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}


class Renderer:
    """Renders pages; remembers what it formatted and in which turn each exemplar came up. Not for two threads at once.

    Of each metric it keeps the series of the last page with this metric and forgets the others. A page without the
    metric (`collect[]` chose other collectors) forgets nothing of it, or its exemplars would come up anew.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, _MetricText] = {}

    def render(self, families: Sequence[Family], openmetrics: bool, *, turn: int = 1, since: int = 0) -> bytes:
        """Return the page, UTF-8; `families` has each metric once.

        Exemplars are in OpenMetrics pages only. Those that no page had so far came up in this `turn`, a number that
        grows with each reading of the collectors; the page has those of a turn after `since`, so that who names the
        turn of the page before gets each exemplar once. ValueError: a series has not the labels or buckets that its
        metric declares.
        """
        lines: list[str] = []
        for family in families:
            text = self._metric_text(family.metric)
            lines.append(text.openmetrics_head if openmetrics else text.text_head)
            used: dict[tuple[str, ...], _SeriesText] = {}
            for series in family.series:
                known = text.series.get(series.labels) or _SeriesText(text, series.labels)
                used[series.labels] = known
                known.append_to(lines, series, openmetrics, turn, since)
            text.series = used
        if openmetrics:
            lines.append("# EOF")
        lines.append("")
        return "\n".join(lines).encode(errors="replace")

    def _metric_text(self, metric: Metric) -> _MetricText:
        known = self._metrics.get(metric.name)
        if known is None or known.metric != metric:
            known = self._metrics[metric.name] = _MetricText(metric)
        return known


class _MetricText:
    """What one metric's series have in common, and the series of its last page."""

    __slots__ = ("bounds", "metric", "openmetrics_head", "sample_name", "series", "text_head")

    def __init__(self, metric: Metric) -> None:
        name, kind = metric.name, metric.type
        self.metric = metric
        self.sample_name = name + _SAMPLE_SUFFIX[kind]
        self.bounds = (*map(canonical_float, metric.bounds), "+Inf")
        self.series: dict[tuple[str, ...], _SeriesText] = {}

        text_help = metric.help.replace("\\", "\\\\").replace("\n", "\\n")
        text_kind = "gauge" if kind == "info" else kind
        self.text_head = f"# HELP {self.sample_name} {text_help}\n# TYPE {self.sample_name} {text_kind}"
        self.openmetrics_head = f"# HELP {name} {_escape(metric.help)}\n# TYPE {name} {kind}"
        if metric.unit:
            self.openmetrics_head += f"\n# UNIT {name} {metric.unit}"


class _SeriesText:
    """One series' lines up to the blank before the value.

    `last` has of each bucket's last exemplar its time in milliseconds, and the turn in which it came up.
    """

    __slots__ = ("counts", "created", "created_line", "last", "metric", "samples")

    def __init__(self, text: _MetricText, values: tuple[str, ...]) -> None:
        self.metric = metric = text.metric
        self.counts = metric.type in ("counter", "histogram")  # only these have exemplars and `_created`
        self.created: float | None = None
        self.created_line = ""
        self.last: dict[int, tuple[int, int]] = {}
        pairs = _pairs(metric, values)
        labels = _braces(pairs)
        if metric.type == "histogram":
            buckets = (_braces([*pairs, f'le="{bound}"']) for bound in text.bounds)
            self.samples = (
                *(f"{metric.name}_bucket{bucket} " for bucket in buckets),
                f"{metric.name}_count{labels} ",
                f"{metric.name}_sum{labels} ",
            )
        else:
            self.samples = (f"{text.sample_name}{labels} ",)

    def append_to(self, lines: list[str], series: Series, openmetrics: bool, turn: int, since: int) -> None:
        value = series.value
        if isinstance(value, Distribution):
            numbers = (*value.cumulative, value.count, value.count, _number(value.sum))
            samples = [f"{prefix}{number}" for prefix, number in zip(self.samples, numbers, strict=True)]
            if openmetrics and value.exemplars:
                for index, exemplar in value.exemplars.items():
                    if 0 <= index <= len(value.cumulative):
                        samples[index] += self._exemplar(index, exemplar, turn, since)
            lines += samples
        else:
            (prefix,) = self.samples
            line = f"{prefix}{_number(value)}"
            if openmetrics and self.counts and series.exemplar:
                line += self._exemplar(0, series.exemplar, turn, since)
            lines.append(line)
        if openmetrics and self.counts and series.created is not None:
            if series.created != self.created:
                labels = _braces(_pairs(self.metric, series.labels))
                self.created = series.created
                self.created_line = f"{self.metric.name}_created{labels} {_number(series.created)}"
            lines.append(self.created_line)

    def _exemplar(self, index: int, exemplar: Exemplar, turn: int, since: int) -> str:
        try:
            milliseconds = round(exemplar.timestamp * 1000)
        except (OverflowError, ValueError):  # Prometheus refuses the page when a timestamp is not finite
            return ""
        known, came_up = self.last.get(index, (-math.inf, 0))
        if milliseconds > known:
            self.last[index] = milliseconds, turn
        elif milliseconds < known or came_up <= since:
            return ""
        return f" # {_exemplar_labels(exemplar.labels)} {_number(exemplar.value)} {milliseconds / 1000:.3f}"


def canonical_float(value: float) -> str:
    """A float as OpenMetrics 1.0 wants it in `le`: Go's `%g` with the fewest digits, and `.0` where neither a point
    nor an exponent shows that it is a float.
    """
    text = _number(float(value))
    if not math.isfinite(value) or abs(value) < 1e6:
        return text
    # Go turns to exponents at 1e6, Python at 1e16.
    candidates = (f"{value:.{digits}e}" for digits in range(17))
    return next(candidate for candidate in candidates if float(candidate) == value)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(int(value))  # True is 1
    text = float.__repr__(value)
    return _SPECIAL_FLOATS.get(text, text)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _pairs(metric: Metric, values: Sequence[str]) -> list[str]:
    return [f'{name}="{_escape(value)}"' for name, value in zip(metric.labels, values, strict=True)]


def _braces(pairs: Sequence[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _exemplar_labels(labels: Iterable[tuple[str, str]]) -> str:
    """As many of the labels, from the first, as fit; without those whose name is no label name or is there already.

    NUL becomes U+FFFD: Prometheus reads it in a series' label, but refuses a page with one in an exemplar.
    """
    room = EXEMPLAR_LABELS_MAX
    kept: dict[str, str] = {}
    for name, value in labels:
        if name in kept or not (name.isascii() and name.isidentifier()):
            continue
        room -= len(name) + len(value)
        if room < 0:
            break
        kept[name] = f'{name}="{_escape(value)}"'
    return f"{{{','.join(kept.values())}}}".replace("\0", "\ufffd")
