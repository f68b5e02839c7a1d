# SPDX-License-Identifier: Apache-2.0
"""Run queue latency: how long runnable tasks wait for a CPU.

Truth: the sums of run_delay (ns) and pcount in `/proc/PID/schedstat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collectors.decoders import OTHER, Totals, counts
from daemon.declare import Collector, Context, Decoded, Hook, Option, Part, Tables, Truth, Variant
from daemon.histogram import SECONDS
from daemon.model import Metric

SCHEDSTAT = "/proc/schedstat"
MAX_TASKS = 1 << 15  # whose last arrival is kept without task storage; 3 MB


def _latency(options: Mapping[str, Any]) -> Metric:
    labels = ("cgroup",) if options["by"] == "cgroup" else ()
    return Metric(
        "bpf_run_queue_latency_seconds", "histogram",
        "Time a runnable task waited for a CPU, migrations included.", labels, "seconds", SECONDS.bounds,
    )  # fmt: skip


def decode(tables: Tables, context: Context) -> Decoded:
    latency = Totals(_latency(context.options), context.max_series)
    if context.options["by"] != "cgroup":
        latency.add((), counts(tables["run_queue_all"][0].value, "wait", SECONDS, context))
        return Decoded([latency.family(context.created)])
    # 'other' comes first, so that it has a place. Groups that are gone go on in it: the sum over all never falls.
    latency.add((OTHER,), counts(tables["run_queue_all"][0].value, "wait", SECONDS, context))
    for row in tables["run_queue"]:
        path = context.cgroup_path(row.key) or OTHER
        latency.add((path,), counts(row.value, "wait", SECONDS, context))
    return Decoded([latency.family(context.created)], latency.dropped)


def _arrivals(schedstat: str) -> int:
    """/proc/schedstat (Documentation/scheduler/sched-stats.rst): the last field of a cpu line is its timeslices run."""
    return sum(int(line.split()[9]) for line in schedstat.splitlines() if line.startswith("cpu"))


def _counted(began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> tuple[int, int]:
    waits = [row.value["wait"] for name in ("run_queue_all", "run_queue") for row in tables[name]]
    ours = sum(sum(wait["slots"]) + wait["overflow"] for wait in waits)
    return ours, _arrivals(now[SCHEDSTAT]) - _arrivals(began[SCHEDSTAT])


def _defines(options: Mapping[str, Any]) -> dict[str, int]:
    macros = {"MAX_TASKS": MAX_TASKS}
    if options["by"] == "cgroup":
        macros |= {"BY_CGROUP": 1, "MAX_CGROUPS": options["max_cgroups"]}
    return macros


_HOOK = {kind: {"sched_switch": Hook(kind, "sched_switch")} for kind in ("tp_btf", "raw_tp")}

COLLECTOR = Collector(
    name="runqlat",
    summary="run queue latency: how long runnable tasks wait for a CPU",
    parts=(
        Part(
            "sched_switch",
            (
                Variant(_HOOK["tp_btf"], define="WAITS_IN_TASKS", needs=("task_struct.bpf_storage",)),
                Variant(_HOOK["tp_btf"]),
                Variant(_HOOK["raw_tp"]),
            ),
        ),
    ),
    structs={
        "task_struct": ("se", "sched_info", "pid", "tgid", "comm", "cgroups"),
        "sched_entity": ("cfs_rq",),
        "cfs_rq": ("rq",),
        "rq": ("clock",),
        "sched_info": ("pcount", "run_delay", "last_queued"),
        "css_set": ("dfl_cgrp",),
        "cgroup": ("kn",),
        "kernfs_node": ("id",),
    },
    options=(
        Option(
            "by",
            "choice",
            "none",
            "a label: cgroup gives each cgroup a histogram of its own",
            choices=("none", "cgroup"),
        ),
        Option("max_cgroups", "int", 256, "cgroups with a histogram of their own", minimum=16, maximum=4096),
    ),
    metrics=lambda options: (_latency(options),),
    defines=_defines,
    tables=("run_queue_all", "run_queue"),
    decode=decode,
    truth=Truth((SCHEDSTAT,), _counted),
)
