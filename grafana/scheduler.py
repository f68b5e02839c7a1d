# SPDX-License-Identifier: Apache-2.0
"""Scheduler: how long and where runnable tasks wait for a CPU."""

from __future__ import annotations

from grafana.parts import Help, Query, board, buckets, graph, heatmap, quantile, variable

_WAIT = "bpf_run_queue_latency_seconds"
_WAITING = f"rate({_WAIT}_sum{{GROUP}}[$__rate_interval])"
_WAITS = f"rate({_WAIT}_count{{GROUP}}[$__rate_interval])"

_PANELS = (
    heatmap(
        "Wait for a CPU", "s",
        Help("How long runnable tasks waited for a CPU, migrations included.",
             "one bright band below 100 us; some dots up to a few milliseconds.",
             "a second band at milliseconds: tasks queue behind others. Waits that end at the same height, such as"
             " 50 to 100 ms: a CPU limit (cpu.max) throttles. The points name processes."),
        buckets(_WAIT, "GROUP"), width=24,
    ),
    graph(
        "Wait for a CPU, quantiles", "s",
        Help("Half of the waits, nine in ten, and so on, are at most this long.",
             "p50 some microseconds, p99 under 10 ms.",
             "p50 high: the whole host is overloaded. p99 alone: bursts, or one throttled cgroup."),
        Query(quantile(0.5, _WAIT, "GROUP"), "p50"), Query(quantile(0.9, _WAIT, "GROUP"), "p90"),
        Query(quantile(0.99, _WAIT, "GROUP"), "p99"), Query(quantile(0.999, _WAIT, "GROUP"), "p99.9"),
    ),
    graph(
        "Tasks waiting", "short",
        Help("Tasks that are runnable and have no CPU, on average: the seconds waited in each second.",
             "below one for each CPU.", "this many more CPUs would be busy at once if the host had them."),
        Query(f"sum by (instance) ({_WAITING})", "{{instance}}"),
    ),
    graph(
        "Tasks waiting, ten largest cgroups", "short",
        Help("Who waits: tasks without a CPU on average. One line unless runqlat has `by: cgroup`.",
             "proportional to each cgroup's share of the work.",
             "a cgroup far above its share is throttled (see cpu.stat) or starts more threads than it has CPUs."),
        Query(f"topk(10, sum by (cgroup) ({_WAITING}))", "{{cgroup}}"),
    ),
    graph(
        "Wait by cgroup, p99, ten longest", "s",
        Help("All but one wait in a hundred are at most this long. One line unless runqlat has `by: cgroup`.",
             "under 10 ms.", "raise cpu.weight or cpu.max of a cgroup that matters, or lower its neighbours'."),
        Query(f'topk(10, {quantile(0.99, _WAIT, "GROUP", "cgroup")})', "{{cgroup}}"),
    ),
    graph(
        "Waits", "cps",
        Help("How often a task got a CPU after a wait, each second.", "some thousands for each CPU.",
             "a jump: many more threads, or threads that wake each other for little work."),
        Query(f"sum by (instance) ({_WAITS})", "{{instance}}"),
    ),
    graph(
        "Waits over 31 ms", "percentunit",
        Help("Share of waits that took longer than 2^-5 s.", "0.",
             "at 1 % the alert RunQueueSaturated is near: users notice such waits."),
        Query(f'1 - sum by (instance) (rate({_WAIT}_bucket{{GROUP,le="0.03125"}}[$__rate_interval]))'
              f" / (sum by (instance) ({_WAITS}) > 0)", "{{instance}}"),
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-scheduler", "Scheduler", "Who waits for a CPU, and for how long.", _PANELS,
    variable("cgroup", f"{_WAIT}_count{{HOST}}"),
)  # fmt: skip
