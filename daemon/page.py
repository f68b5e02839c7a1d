# SPDX-License-Identifier: Apache-2.0
"""The page for people: what this host is doing right now. Everything on it is escaped here, whoever named it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from daemon import recent, triage
from daemon.cards import CARDS, Card, View
from daemon.look import SCRIPT, STYLE
from daemon.recent import Now
from daemon.triage import RESOURCES, Finding
from daemon.words import age, amount, count, hooks, share

Status = Mapping[str, Any]
REFRESH_SECONDS = 5  # without JavaScript

_LINKS = {"metrics": "metrics", "status": "status", "-/ready": "ready", "#about": "how to read this"}
_ICON = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'>"
    "<circle cx='4' cy='4' r='4' fill='{}'/></svg>"
)
_STATISTICS_OFF = """
<p class="dim">The kernel counts what programs cost once <code>sysctl kernel.bpf_stats_enabled=1</code> is set.</p>
"""
_ABOUT = f"""
<p>A figure is of the seconds named at the top; an outline, and what is since start, is of all since counting
began. Quantiles are found within buckets that double, as Prometheus does: within a factor of two they are certain. All
time axes are the same. Cost is time on one CPU.</p>
<p>Colour means trouble. A disk is slow where one request in a hundred takes over
{amount(triage.DISK_SECONDS, "seconds")} and over {triage.DISK_TIMES} times what is usual, or over
{amount(triage.DISK_ALWAYS, "seconds")}; failing where requests fail. CPUs are saturated where one wait in a hundred is
over {amount(triage.WAIT_SECONDS, "seconds")}. Memory ran out where processes were killed; the page cache misses where
over {count(triage.MISS_RATE)} pages a second are not in it and hits are below {share(triage.HIT_SHARE)} of the usual.
The network loses where over {share(triage.RETRANSMIT_SHARE)} of the segments sent by the host's own network namespace
(over {triage.RETRANSMIT_MANY}/s where that is not known) are sent again. Kills and failures stay for the minutes that
the pictures show.</p>
<p>In a terminal: <code>bpfmetricsd show NAME 1</code>, <code>bpfmetricsd status</code>. Documentation:
<code>man bpfmetricsd</code>, <code>man bpfmetricsd.yaml</code>, <code>docs/operating.md</code>.</p>
"""


def render(status: Status, view: View, host: str) -> str:
    """The whole page. `status` is what `/status` answers."""
    up = {name: bool(one["up"]) for name, one in status["collectors"].items()}
    findings = triage.triage(view.now, up)
    problems = [one.sentence for one in findings.values() if one.bad]
    if not status["ready"]:
        problems.append("bpfmetricsd is not well.")
    bad = bool(problems)
    verdict = " ".join(problems) or "All is well."
    rows = "".join(_row(name, one, status, view) for name, one in status["collectors"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"{verdict} {host}")}</title>
<link rel="icon" href="{escape(_ICON.format("%23c8321f" if bad else "%235b6670"))}">
<noscript><meta http-equiv="refresh" content="{REFRESH_SECONDS}"></noscript>
<style>{STYLE}</style><script>{SCRIPT}</script></head>
<body>
<p class="silent" role="status"></p>
<header>
<h1{' class="bad"' if bad else ""}>{escape(verdict)}</h1>
<p class="dim">{escape(_about_now(status, view, host))}</p>
<nav>{" ".join(f'<a href="{path}">{name}</a>' for path, name in _LINKS.items())}</nav>
</header>
{_notes(status, view.now)}
<main class="board">
{"".join(_resource(name, findings[name], status, view) for name in RESOURCES)}<section class="measured">
<h2>How it is measured</h2>
<table>
<thead><tr>{"".join(f"<th>{one}</th>" for one in _COLUMNS)}</tr></thead>
<tbody>
{rows}</tbody>
</table>
{_STATISTICS_OFF if "not counted" in rows else ""}</section>
</main>
<section class="about" id="about">
<h2>How to read this</h2>
{_ABOUT.strip()}
</section>
</body>
</html>
"""


def _about_now(status: Status, view: View, host: str) -> str:
    """`db1, 14:03:11 UTC, the last 12 s`"""
    clock = time.strftime("%H:%M:%S %Z", time.localtime(view.wall))
    window = f"the last {view.now.change.seconds:.0f} s" if view.now.change else "the first reading"
    return f"{host} at {clock}, {window}. Linux {status['kernel']}, bpfmetricsd {status['version']}"


def _notes(status: Status, now: Now) -> str:
    """What is not well with the daemon itself, then what a person should know."""
    lines = [("bad", one) for one in status["reasons"]]
    if now.change:
        for key, lost in now.change.values.get(recent.LOST, {}).items():
            if recent.size(lost):
                lines.append(("bad", f"{key[0]} loses events now: {count(recent.size(lost))} by {key[1]}"))
    lines += [("dim", one) for one in status["notes"]]
    items = "".join(f'<li class="{kind}">{escape(str(one))}</li>' for kind, one in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _resource(name: str, finding: Finding, status: Status, view: View) -> str:
    """A resource's head, and its collectors. The style puts all heads first where there is no room for columns."""
    kind = "bad" if finding.bad else "calm"
    cards = [
        _card(one, status["collectors"][one], view, finding.collector == one)
        for one in RESOURCES[name]
        if one in status["collectors"]
    ]
    target = next((one for one in RESOURCES[name] if one in status["collectors"]), "about")
    return f"""<section class="resource">
<a class="head {kind}" href="#{target}"><h2>{name}</h2>
<p class="word">{escape(finding.word)}</p><p class="why">{escape(finding.sign)}</p></a>
<div class="cards">{"".join(cards)}</div>
</section>
"""


def _card(name: str, one: Status, view: View, bad: bool) -> str:
    link = f'<a href="metrics?collect[]={quote(name)}">{escape(name)}</a>'
    made = _made(name, view) if one["up"] else None
    if made is None:
        why = escape(str(one["error"] or "no reading yet"))
        return f'<article class="card" id="{escape(name)}"><h3>{link}</h3><p class="bad">{why}</p></article>'
    trail = f'<div class="trail">{made.trail}<span class="dim">{escape(made.beside)}</span></div>' if made.trail else ""
    figure = f'<p class="figure">{escape(made.figure)}</p><p class="says">{escape(made.says)}</p>'
    return f"""
<article class="card{" bad" * bad}" id="{escape(name)}"><h3>{escape(made.title)} {link}</h3>
<div class="sum"><div>{figure}</div>{trail}</div>
<figure>{made.picture}<figcaption>{escape(made.caption)}</figcaption></figure>
{_table(made)}{_list(made.remarks)}</article>
"""


def _made(name: str, view: View) -> Card | None:
    """None where the reading is older than the collector."""
    try:
        return CARDS[name](view)
    except KeyError:
        return None


def _table(card: Card) -> str:
    if not card.table:
        return ""
    head, *rows = card.table
    return (
        f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"
        + "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        + "</table>"
    )


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="remarks">{"".join(f"<li>{escape(one)}</li>" for one in lines)}</ul>' if lines else ""


_COLUMNS = ("Collector", "Hooks", "Fidelity", "Lost", "Cost", "For")


def _row(name: str, one: Status, status: Status, view: View) -> str:
    down = "" if one["up"] else '<span class="bad">down</span> '
    if "programs" not in one:
        cells = [escape(name), down, *([""] * (len(_COLUMNS) - 2))]
    else:
        cells = [
            escape(name),
            f"{down}<code>{escape(hooks(each['hook'] for each in one['programs'].values()))}</code>",
            _lines(_fidelity(one)),
            _lost(one["lost"]),
            _lines(_cost(name, status, view.now)),
            escape(age(view.wall - one["started"])),
        ]
    labelled = [f'<td data-label="{label}">{cell}</td>' for label, cell in zip(_COLUMNS, cells, strict=True) if cell]
    return f"<tr>{''.join(labelled)}</tr>\n"


def _fidelity(one: Status) -> list[str]:
    reasons = dict.fromkeys(each["reason"] for each in one["programs"].values() if each["reason"])
    return [f"approximate: {reason}" for reason in (*reasons, *one.get("notes", {}).values())] or ["exact"]


def _lost(lost: Mapping[str, int]) -> str:
    return _lines([f"{count(number)} by {reason}" for reason, number in lost.items() if number] or ["none"])


def _lines(texts: Iterable[str]) -> str:
    return "<br>".join(map(escape, texts))


def _cost(name: str, status: Status, now: Now) -> list[str]:
    """Of the last seconds: time for each run, and the share of one CPU."""
    runs, seconds = (
        recent.size(now.change.values.get(metric, {}).get((name,), 0)) if now.change else 0.0
        for metric in (recent.RUNS, recent.RUN_TIME)
    )
    if now.change and runs:
        return [f"{share(seconds / now.change.seconds)} CPU", f"{1e9 * seconds / runs:.0f} ns a run"]
    counting = status["bpf_stats_enabled"] or (now.change and recent.total(now.change.values, recent.RUNS))
    return ["no run"] if counting else ["not counted"]
