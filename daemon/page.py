# SPDX-License-Identifier: Apache-2.0
"""The page for people: collectors, their health, a picture of each histogram. No scripts, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from daemon import histogram
from daemon.model import Distribution, Family, Metric

_WIDTH, _HEIGHT, _FOOT = 360, 90, 16
_TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
_SIZES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
_LINKS = ("/metrics", "/status", "/-/ready", "/-/healthy")
_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --bar: #2563a8; --bad: #b3261e; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --bar: #6ea8e6; --bad: #f2857d; --dim: #aaa; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
.bad { color: var(--bad); font-weight: 600; } .dim { color: var(--dim); }
code { overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; width: 22.5rem; max-width: 100%; }
svg { width: 100%; height: auto; } rect { fill: var(--bar); } text { fill: var(--dim); font-size: 10px; }
"""


def render(status: Mapping[str, Any], families: Sequence[Family]) -> str:
    """The whole page. `status` is what `/status` answers."""
    links = " · ".join(f'<a href="{path}">{path}</a>' for path in _LINKS)
    rows = "\n".join(_row(name, one) for name, one in status["collectors"].items())
    pictures = "\n".join(figure for family in families if (figure := _figure(family)))
    verdict = "All is well." if status["ready"] else '<span class="bad">Not well.</span>'
    remarks = "".join(f"<li>{escape(str(one))}</li>" for one in (*status["reasons"], *status["notes"]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bpfmetricsd</title><style>{_STYLE}</style></head>
<body>
<h1>bpfmetricsd</h1>
<p>{verdict} <span class="dim">Version {escape(status["version"])}, kernel {escape(status["kernel"])}.</span></p>
<p>{links}</p>
{f"<ul>{remarks}</ul>" if remarks else ""}
<table>
<tr><th>Collector</th><th>State</th><th>Hooks</th><th>Fidelity</th><th>Lost</th></tr>
{rows}
</table>
<h2>Since counting began</h2>
{pictures or '<p class="dim">Nothing counted yet.</p>'}
</body>
</html>
"""


def _row(name: str, one: Mapping[str, Any]) -> str:
    programs = one.get("programs", {})
    hooks = "<br>".join(f"<code>{escape(each['hook'])}</code>" for each in programs.values())
    reasons = dict.fromkeys(each["reason"] for each in programs.values() if each["reason"])
    fidelity = "<br>".join(escape(f"approximate: {reason}") for reason in reasons) or ("exact" if programs else "")
    lost = "<br>".join(f"{count} {escape(reason)}" for reason, count in one.get("lost", {}).items() if count)
    state = "up" if one["up"] else '<span class="bad">down</span>'
    cells = (f"<code>{escape(name)}</code>", state, hooks, fidelity, lost or ("0" if programs else ""))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _figure(family: Family) -> str:
    """A histogram over all its labels; empty for what is none, or has counted nothing."""
    total: Distribution | None = None
    for series in family.series:
        if isinstance(series.value, Distribution):
            total = histogram.add(total, series.value) if total else series.value
    if total is None or not total.count:
        return ""
    metric = family.metric
    mean = _amount(total.sum / total.count, metric.unit)
    facts = f"<code>{escape(metric.name)}</code>, {total.count} events, mean {mean}"
    caption = f'{escape(metric.help)}<br><span class="dim">{facts}</span>'
    return f"<figure>{_svg(metric, total)}<figcaption>{caption}</figcaption></figure>"


def _svg(metric: Metric, value: Distribution) -> str:
    """A bar for each bucket from the first to the last that holds something, and the bounds at both ends."""
    edges = (0.0, *metric.bounds, float("inf"))
    counts = histogram.buckets(value)
    used = [i for i, count in enumerate(counts) if count]
    first, last, most = used[0], used[-1], max(counts)
    step = _WIDTH / max(8, last - first + 1)
    bars = []
    for i in range(first, last + 1):
        high = round(max(1.0, _HEIGHT * counts[i] / most) if counts[i] else 0, 1)
        name = f"{_amount(edges[i], metric.unit)} to {_amount(edges[i + 1], metric.unit)}: {counts[i]}"
        bars.append(
            f'<rect x="{(i - first) * step + 1:.1f}" y="{_HEIGHT - high:.1f}" width="{step - 2:.1f}" height="{high}">'
            f"<title>{escape(name)}</title></rect>"
        )
    right = (last - first + 1) * step
    low, top = _amount(edges[first], metric.unit), _amount(edges[last + 1], metric.unit)
    labels = (
        f'<text x="0" y="{_HEIGHT + 12}">{escape(low)}</text>'
        f'<text x="{right:.1f}" y="{_HEIGHT + 12}" text-anchor="end">{escape(top)}</text>'
    )
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}"'
    return f'<svg {box} role="img" aria-label="{escape(metric.help)}">{"".join(bars)}{labels}</svg>'


def _amount(value: float, unit: str) -> str:
    """A value in the unit that suits it: `31 ms`, `4.0 KiB`."""
    if value == float("inf"):
        return "∞"
    steps = _TIMES if unit == "seconds" else _SIZES
    size, name = next((one for one in reversed(steps) if value >= one[0] * 0.95), steps[0])
    amount = value / size
    return f"{amount:.0f} {name}" if amount >= 10 else f"{amount:.2g} {name}"
