# SPDX-License-Identifier: Apache-2.0
"""What `status`, `check` and `list` print: plain data in, lines out."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from daemon.declare import Collector, Option
from daemon.words import age, hooks, share

if TYPE_CHECKING:
    from daemon.attach import Plan

Status = Mapping[str, Any]
_COVERED = 0.99  # as the alert on bpfmetricsd_coverage_ratio


class Style:
    """Colours and bold type; nothing where `on` is False."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def bold(self, text: str) -> str:
        return self._wrap("1", text)

    def good(self, text: str) -> str:
        return self._wrap("32", text)

    def bad(self, text: str) -> str:
        return self._wrap("1;31", text)

    def _wrap(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._on else text


def style(stream: IO[str] | None, environ: Mapping[str, str] = os.environ) -> Style:
    """Colours on a terminal only, and not where NO_COLOR asks for none (no-color.org). None: stdout is closed."""
    terminal = stream is not None and stream.isatty()
    return Style(terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb")


def columns(rows: Sequence[Sequence[str]], width: int = 0) -> list[str]:
    """Rows as aligned columns. With a width, the last column is broken into lines where a row would pass it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    lines = []
    for row in rows:
        start = "".join(f"{cell:<{size}}  " for cell, size in zip(row[:-1], widths[:-1], strict=True))
        parts = textwrap.wrap(row[-1], max(30, width - indent), break_on_hyphens=False) if width else [row[-1]]
        lines.append(f"\n{'':<{indent}}".join([f"{start}{''.join(parts[:1])}".rstrip(), *parts[1:]]))
    return lines


def size(number: int) -> str:
    """`1.2 MiB`"""
    amount = float(number)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def status(found: Status, now: float, look: Style, width: int = 120) -> list[str]:
    """One screen: the verdict, what is wrong, a table of collectors, what is approximate."""
    collectors: Mapping[str, Status] = found["collectors"]
    up = sum(one["up"] for one in collectors.values())
    memory = sum(use["memory_bytes"] for one in collectors.values() for use in one.get("maps", {}).values())
    lost = sum(sum(one.get("lost", {}).values()) for one in collectors.values())
    verdict = look.good("all is well") if found["ready"] else look.bad("not well")
    summary = f"{verdict}: {up} of {len(collectors)} collectors up, {size(memory)} of kernel memory, {_lost(lost)}"
    lines = [summary, *(f"  {reason}" for reason in found["reasons"]), *(f"  note: {note}" for note in found["notes"])]
    rows = [_HEAD, *(_row(name, one, now) for name, one in collectors.items())]
    head, *body = columns(_without_empty(rows), width)
    lines += [
        "",
        look.bold(head),
        *(line if one["up"] else look.bad(line) for line, one in zip(body, collectors.values(), strict=True)),
    ]
    remarks = [remark for name, one in collectors.items() for remark in _remarks(name, one)]
    if up and not found["bpf_stats_enabled"] and not any(_runs(one)[0] for one in collectors.values()):
        remarks.append("the programs' cost is not counted; 'sysctl kernel.bpf_stats_enabled=1' turns that on")
    return lines + ([""] if remarks else []) + remarks


_HEAD = ("COLLECTOR", "STATE", "SINCE", "MEMORY", "FULLEST MAP", "LOST", "NS/RUN", "HOOKS")


def _row(name: str, one: Status, now: float) -> tuple[str, ...]:
    state = ("up" if one["error"] is None else "stale") if one["up"] else "down"
    if "started" not in one:
        return (name, state, "", "", "", "", "", "")
    runs, time_ns = _runs(one)
    cost = f"{time_ns / runs:.0f}" if runs else ""
    memory = size(sum(use["memory_bytes"] for use in one["maps"].values()))
    lost = sum(one["lost"].values())
    since, where = age(now - one["started"]), hooks(each["hook"] for each in one["programs"].values())
    return (name, state, since, memory, _fullest(one["maps"]), str(lost), cost, where)


def _without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without the columns that no row fills."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _lost(number: int) -> str:
    return f"{number} events lost" if number else "no events lost"


def _runs(one: Status) -> tuple[int, int]:
    """Runs and nanoseconds of all of a collector's programs."""
    programs = one.get("programs", {}).values()
    return sum(each["runs"] for each in programs), sum(each["run_time_ns"] for each in programs)


def _fullest(maps: Mapping[str, Status]) -> str:
    """Of the maps whose entries are counted, and that so can fill up."""
    counted = {name: use for name, use in maps.items() if use["entries"] is not None}
    if not counted:
        return ""
    name, use = max(counted.items(), key=lambda item: item[1]["entries"] / item[1]["max_entries"])
    return f"{name} {use['entries']} of {use['max_entries']}"


def _remarks(name: str, one: Status) -> Iterable[str]:
    reasons = dict.fromkeys(each["reason"] for each in one.get("programs", {}).values() if each["reason"])
    yield from (f"{name} is approximate: {reason}" for reason in (*reasons, *one.get("notes", {}).values()))
    lost = ", ".join(f"{number} by {reason}" for reason, number in one.get("lost", {}).items() if number)
    if lost:
        yield f"{name} lost events: {lost}"
    coverage = one.get("coverage")
    if coverage is not None and coverage < _COVERED:
        yield f"{name} counts {share(coverage)} of what the kernel counts of the same"
    if one.get("series_dropped"):
        yield f"{name} added {one['series_dropped']} label sets to 'other'; raise max_series to see them apart"


def check(name: str, plan: Plan, look: Style) -> list[str]:
    """One collector: where each program would hang, why its counts are approximate, and what was passed over."""
    reasons = list(dict.fromkeys(variant.approximate for variant in plan.variants.values() if variant.approximate))
    lines = [f"{look.bold(name)}: {'approximate' if reasons else 'exact'}"]
    lines += [f"  {line}" for line in columns([(program, str(hook)) for program, (hook, _) in plan.programs.items()])]
    lines += [f"  approximate: {reason}" for reason in reasons]
    return lines + [f"  passed over: {what}: {why}" for what, why in plan.refused.items()]


def collectors(every: Iterable[Collector], look: Style) -> list[str]:
    lines = []
    for one in every:
        lines.append(f"{look.bold(f'{one.name:<11}')} {one.summary}")
        rows = [(option.name, _default(option), f"{option.help}{_bounds(option)}") for option in one.options]
        lines += [f"{'':<13} {line}" for line in columns(rows)] if rows else []
    return lines


def _default(option: Option) -> str:
    match option.default:
        case bool():
            return str(option.default).lower()
        case tuple():
            return f"[{', '.join(map(str, option.default))}]"
        case other:
            return str(other)


def _bounds(option: Option) -> str:
    match option.kind:
        case "choice":
            return f" ({' | '.join(option.choices)})"
        case "int":
            return f" ({option.minimum} to {option.maximum})"
        case "ports":
            return f" (at most {option.maximum})"
        case _:
            return ""
