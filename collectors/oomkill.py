# SPDX-License-Identifier: Apache-2.0
"""OOM kills by scope and by the victim's cgroup, each with a journal entry.

Scope `memcg`: a memory cgroup reached its limit; `global`: the machine ran out; `unknown`: this kernel does not tell.
The cgroup is the victim's, not the one whose limit was reached.

Truth: `oom_kill` in `/proc/vmstat` and in `memory.events`, which count the first victim of a group that is killed as a
whole (`memory.oom.group`) twice. Coverage knows how often that happened, on a kernel that shows its symbols.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from collectors.decoders import OTHER, Totals, Words, exemplar, text, words_text
from daemon.cgroups import pod, unit
from daemon.declare import Collector, Context, Decoded, Event, Hook, Option, Part, Tables, Truth, Variant
from daemon.model import Metric

SCOPES = ("unknown", "global", "memcg")  # enum scope
MAX_CGROUPS = 1000
RING_PAGES = 64
MESSAGE_ID = "b7a3e0c64f1d4a58933e6c1f0d2b9a84"
VMSTAT = "/proc/vmstat"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

KILLS = Metric(
    "bpf_oom_kills", "counter", "Processes killed because memory ran out, by scope and the victim's cgroup.",
    ("scope", "cgroup"),
)  # fmt: skip


def cgroup_path(levels: Sequence[Mapping[str, bytes]], deeper: int) -> str:
    """struct level path[LEVELS], innermost first: `/a/b`; `…/a/b` where the outermost had no room."""
    parts = [part for level in levels if (part := text(level["name"]))]
    return ("…" if deeper else "") + "/" + "/".join(reversed(parts))


def _words(path: str) -> Words:
    return lambda _: pod(path)


def decode(tables: Tables, context: Context) -> Decoded:
    kills = Totals(KILLS, context.max_series)
    for row in tables["kills_other"]:
        kills.add((SCOPES[row.key], OTHER), row.value)
    for row in tables["kills"]:
        path = cgroup_path(row.value["path"], row.value["deeper"])
        found = exemplar(row.value.get("count_exemplar"), 1, context, _words(path))
        kills.add((SCOPES[row.key["scope"]], path), row.value["count"], found)
    return Decoded([kills.family(context.created)], kills.dropped)


def _kills(vmstat: str) -> int:
    """`oom_kill` of /proc/vmstat."""
    return next((int(line.split()[1]) for line in vmstat.splitlines() if line.startswith("oom_kill ")), 0)


def _counted(began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> tuple[int, int] | None:
    """None where the kernel hides its symbols: what it counted twice is not known then."""
    kills: Counter[str] = Counter()
    for row in tables["kills"]:
        kills[SCOPES[row.key["scope"]]] += row.value["count"]
    for row in tables["kills_other"]:
        kills[SCOPES[row.key]] += row.value
    if kills["unknown"]:
        return None
    again = sum(row.value for row in tables["kills_again"])
    return kills.total(), _kills(now[VMSTAT]) - _kills(began[VMSTAT]) - again


def event(record: Any, context: Context) -> Event:
    """struct victim. The kernel counts the victim's memory in pages."""
    path = cgroup_path(record["path"], record["deeper"])
    comm, scope = words_text(record["comm"]), SCOPES[record["scope"]]
    anon, file, shmem = (record[f"{kind}_pages"] * _PAGE_BYTES for kind in ("anon", "file", "shmem"))
    why = {"memcg": "a memory cgroup reached its limit", "global": "the machine ran out of memory"}
    message = (
        f"OOM kill: {comm} (pid {record['pid']}) in cgroup {path} with {(anon + file + shmem) >> 20} MiB resident"
        f" was killed because {why.get(scope, 'memory ran out')}"
    )
    fields = {
        "pid": record["pid"], "comm": comm, "scope": scope, "cgroup": path, "unit": unit(path), **dict(pod(path)),
        "rss_bytes": anon + file + shmem, "anon_bytes": anon, "file_bytes": file, "shmem_bytes": shmem,
        "oom_score_adj": record["oom_score_adj"], "killer_pid": record["killer_pid"],
        "killer_comm": words_text(record["killer_comm"]),
    }  # fmt: skip
    return Event(MESSAGE_ID, 3, message, fields, context.wall_clock(record["time_ns"]))


def _defines(options: Mapping[str, Any]) -> dict[str, int]:
    macros = {"MAX_CGROUPS": MAX_CGROUPS}
    if options["events"]:
        macros |= {"EVENTS_ON": 1, "RING_PAGES": RING_PAGES}
    return macros


COLLECTOR = Collector(
    name="oomkill",
    summary="OOM kills by scope and the victim's cgroup",
    parts=tuple(
        Part(target, tuple(Variant({target: Hook(kind, target)}) for kind in ("tp_btf", "raw_tp")))
        for target in ("signal_generate", "mark_victim")
    ),
    structs={
        "task_struct": ("pid", "tgid", "comm", "mm", "signal", "cgroups"),
        "signal_struct": ("oom_score_adj", "oom_mm"),
        "mm_struct": ("rss_stat",),
        "mm_rss_stat": ("count?",),
        "percpu_counter": ("count",),
        "css_set": ("dfl_cgrp",),
        "cgroup": ("kn",),
        "kernfs_node": ("id", "name", "parent?", "__parent?"),
    },
    symbols=("mem_cgroup_out_of_memory", "mem_cgroup_scan_tasks"),
    options=(Option("events", "bool", True, "write each kill to the journal"),),
    metrics=lambda options: (KILLS,),
    defines=_defines,
    tables=("kills", "kills_other", "kills_again"),
    decode=decode,
    truth=Truth((VMSTAT,), _counted, enough=1),
    event=event,
)
