# SPDX-License-Identifier: Apache-2.0
"""SVG pictures: a histogram, counts of the last minutes as bars, a line of the last minutes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import inf, log2

from daemon import histogram
from daemon.model import Distribution
from daemon.recent import POINTS
from daemon.words import amount, count, rate

WIDTH, HEIGHT, FOOT = 300, 84, 18
TOP, LOW = 14, 56
TRAIL_WIDTH, TRAIL_HEIGHT = 120, 30
_TICKS = {"seconds": (1e-6, 1e-3, 1.0), "bytes": (1.0, 2.0**10, 2.0**20, 2.0**30)}


def spectrum(
    label: str, unit: str, bounds: Sequence[float], now: Distribution | None, ever: Distribution, mark: float | None
) -> str:
    """Bars of `now` and, behind them at a scale of its own, the outline of all there ever was.

    The axis is always the same, whatever was counted, so that pictures compare and nothing jumps. `mark` is a quantile.
    """
    step = WIDTH / (len(bounds) + 1)
    edges = (0.0, *bounds, inf)
    bars = []
    for i, n in enumerate(counts := histogram.buckets(now) if now else []):
        if n:
            high = max(1.5, HEIGHT * n / max(counts))
            name = f"{amount(edges[i], unit)} to {amount(edges[i + 1], unit)}: {n}"
            bars.append(_rect("now", i * step + 0.75, high, step - 1.5, HEIGHT, name))
    return _svg(
        label,
        HEIGHT + FOOT,
        _outline(histogram.buckets(ever), step),
        *bars,
        _axis(HEIGHT),
        *(_tick(at(one, bounds, step), amount(one, unit)) for one in _TICKS[unit] if bounds[0] / 2 < one <= bounds[-1]),
        _mark(at(mark, bounds, step)) if mark else "",
    )


def at(value: float, bounds: Sequence[float], step: float) -> float:
    """The place of a value on an axis whose buckets double and are all as wide."""
    if value == inf:
        return (len(bounds) + 1) * step
    return max(0.0, (log2(value / bounds[0]) + 1) * step) if value > 0 else 0.0


def _outline(counts: Sequence[int], step: float) -> str:
    most = max(counts)
    if not most:
        return ""
    steps = "".join(f"V{HEIGHT - HEIGHT * n / most:.1f}H{(i + 1) * step:.1f}" for i, n in enumerate(counts))
    return f'<path class="ever" d="M0 {HEIGHT}{steps}V{HEIGHT}"/>'


def history(label: str, per_second: Sequence[float], parts: Sequence[float], minutes: str, whole: bool = False) -> str:
    """A bar for each step of the last minutes, newest at the right; of each, `parts` is what is bad of it."""
    step, most = WIDTH / POINTS, max(per_second, default=0)
    first, floor = POINTS - len(per_second), TOP + LOW
    bars = []
    for i, (all_of_it, part) in enumerate(zip(per_second, parts, strict=True)):
        if all_of_it:
            left, wide = (first + i) * step + 0.5, step - 1
            high = max(1.5, LOW * all_of_it / most)
            bars.append(_rect("now", left, high, wide, floor))
            if part:
                bars.append(_rect("more", left, max(1.5, high * part / all_of_it), wide, floor))
    top = f"up to {count(most) if whole else rate(most)}" if most else ""
    return _svg(
        label,
        floor + FOOT,
        *bars,
        _axis(floor),
        _text(0, floor + 14, minutes),
        _text(WIDTH, floor + 14, "now", "end"),
        _text(WIDTH, 9, top, "end"),
    )


def trail(label: str, values: Sequence[float | None]) -> str:
    """A line through what is known, newest at the right."""
    most = max((one for one in values if one is not None), default=0.0)
    step, first = TRAIL_WIDTH / (POINTS - 1), POINTS - len(values)
    places: list[str] = []
    line, last = "", None
    for i, one in enumerate(values):
        if one is None or not most:
            last = None
            continue
        x, y = (first + i) * step, 2 + (TRAIL_HEIGHT - 4) * (1 - one / most)
        line += f"{'M' if last is None else 'L'}{x:.1f} {y:.1f}"
        last = (x, y)
    if line:
        places.append(f'<path class="line" d="{line}"/>')
    if last:
        places.append(f'<circle class="dot" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="2.5"/>')
    return _svg(label, TRAIL_HEIGHT, *places, width=TRAIL_WIDTH)


def _rect(kind: str, x: float, high: float, wide: float, bottom: float, name: str = "") -> str:
    box = f'class="{kind}" x="{x:.1f}" y="{bottom - high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    return f"<rect {box}><title>{escape(name)}</title></rect>" if name else f"<rect {box}/>"


def _axis(y: int) -> str:
    return f'<path class="axis" d="M0 {y}.5H{WIDTH}"/>'


def _tick(x: float, name: str) -> str:
    line = f'<path class="axis" d="M{x:.1f} {HEIGHT}v4"/>'
    return line + _text(x, HEIGHT + 14, name, "middle")


def _mark(x: float) -> str:
    line = f'<path class="mark" d="M{x:.1f} 0V{HEIGHT}"/>'
    return line + (_text(x - 4, 9, "p99", "end") if x > WIDTH - 40 else _text(x + 4, 9, "p99"))


def _text(x: float, y: float, what: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.0f}" text-anchor="{anchor}">{escape(what)}</text>' if what else ""


def _svg(label: str, height: float, *inside: str, width: int = WIDTH) -> str:
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{''.join(inside)}</svg>"
