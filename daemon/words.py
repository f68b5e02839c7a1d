# SPDX-License-Identifier: Apache-2.0
"""Numbers and lists as a person reads them: two or three digits that count, and the unit that suits them."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

_TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
_SIZES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
_COUNTS = ((1.0, ""), (1e3, " k"), (1e6, " M"), (1e9, " G"))
_AGES = (("d", 86400), ("h", 3600), ("min", 60))


def amount(value: float, unit: str) -> str:
    """A value in the unit that suits it: `31 ms`, `4 KiB`."""
    if value == inf:
        return "∞"
    steps = _TIMES if unit == "seconds" else _SIZES
    size, name = next((one for one in reversed(steps) if value >= one[0] * 0.95), steps[0])
    number = value / size
    return f"{number:.0f} {name}" if number >= 9.95 else f"{number:.2g} {name}"


def count(value: float) -> str:
    """`0`, `0.4`, `7.5`, `185`, `12.4 k`; whole numbers below a thousand stay whole."""
    if value < 1000:
        if value == int(value):
            return f"{value:.0f}"
        return f"{value:.2g}" if value < 9.95 else f"{value:.0f}"
    size, name = next(one for one in reversed(_COUNTS) if value >= one[0] * 0.9995)
    number = value / size
    return f"{number:.3g}{name}" if number < 999.5 else f"{number:.0f}{name}"


def rate(per_second: float) -> str:
    return f"{count(per_second)}/s"


def share(ratio: float) -> str:
    """`99.8 %`. What is not all is not told as all, nor as nothing what is a little."""
    percent = 100 * ratio
    if 99.95 <= percent < 100:
        return "> 99.9 %"
    if 0 < percent < 0.005:
        return "< 0.01 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def age(seconds: float) -> str:
    """`2 h 13 min`: the two largest units."""
    parts: list[str] = []
    rest = max(0, int(seconds))
    for name, size in _AGES:
        if rest >= size or parts:
            parts.append(f"{rest // size} {name}")
            rest %= size
    return " ".join(parts[:2]) or f"{rest} s"


def hooks(names: Iterable[str]) -> str:
    """`tp_btf: sched_switch sched_wakeup; kprobe: …`"""
    kinds: dict[str, list[str]] = {}
    for one in names:
        kind, _, target = one.partition(":")
        kinds.setdefault(kind, []).append(target)
    return "; ".join(f"{kind}: {' '.join(dict.fromkeys(targets))}" for kind, targets in kinds.items())


def who(labels: Iterable[tuple[str, str]]) -> str:
    """An exemplar's labels: `fio (pid 4242), 10.0.0.1:443 to 10.0.0.2:51234, /system.slice/db.service`."""
    known = dict(labels)
    pid = f" (pid {known['pid']})" if "pid" in known else ""
    ends = ""
    if "raddr" in known:
        ends = f"{known.get('laddr', '')}:{known.get('lport', '')} to {known['raddr']}:{known.get('rport', '')}"
    pod = f"pod {known['pod']}" if "pod" in known else ""
    parts = [f"{known.get('comm', '')}{pid}".strip(), ends, known.get("cgroup", ""), pod]
    return ", ".join(filter(None, parts)) or "no task"
