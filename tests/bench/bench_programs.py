# SPDX-License-Identifier: Apache-2.0
"""What a run of a program costs above an empty one at the same hook: `python tests/bench/bench_programs.py`, as root.

By the kernel's own statistics (BPF_STATS_RUN_TIME), whose own time is the empty program's figure. Interrupts prolong
runs, so the least of a few measurements is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import collectors
from daemon import libbpf, loader, pins
from daemon.compiler import compile_text
from daemon.config import Config, parse
from daemon.libbpf import ProgramStatistics
from tests.kernel import load as loads

FIO = ("fio", "--name=load", "--direct=1", "--ioengine=libaio", "--rw=randrw", "--bs=4k", "--iodepth=16", "--minimal")
REPEATS = 4
Load = Callable[[], None]


@dataclass(frozen=True)
class Case:
    collector: str
    options: str
    forbid: str
    load: Load

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.options, f"without {self.forbid}" if self.forbid else "")))


@dataclass(frozen=True)
class Cost:
    program: str
    runs: int
    gross_ns: float
    empty_ns: float

    @property
    def net_ns(self) -> float:
        return self.gross_ns - self.empty_ns


@contextmanager
def loaded(case: Case) -> Iterator[dict[str, int]]:
    """The collector's programs, by name, as descriptors."""
    with tempfile.TemporaryDirectory() as folder:
        text = f"collectors: {{{case.collector}: {{{case.options}}}}}\n"
        config = parse(text, "bench", {one.name: one.options for one in collectors.ALL})
        bpffs = Path(f"/sys/fs/bpf/bpfmetricsd_bench_{os.getpid()}")
        config = replace(config, bpffs=bpffs, state=Path(folder) / "state")
        os.environ[loader.FORBID] = case.forbid
        try:
            outcome = loader.load(config, group=0, say=print)[case.collector]
            if outcome.action == "failed":
                raise SystemExit(outcome.detail)
            programs = config.bpffs / case.collector / pins.PROGRAMS
            descriptors = {path.name: libbpf.obj_get(path, libbpf.F_RDONLY) for path in sorted(programs.iterdir())}
            try:
                yield descriptors
            finally:
                for descriptor in descriptors.values():
                    os.close(descriptor)
        finally:
            loader.unload(Config(collectors={}, bpffs=config.bpffs, state=config.state))


@contextmanager
def empty(target: str) -> Iterator[int]:
    """An empty program at a tracepoint."""
    code = compile_text("int empty(void *ctx) { return 0; }", ()).functions["empty"]
    number = libbpf.vmlinux_btf_id(target, libbpf.ATTACH_TRACE_RAW_TP)
    program = libbpf.prog_load("empty", libbpf.PROG_TYPE_TRACING, code, libbpf.ATTACH_TRACE_RAW_TP, number)
    link = libbpf.raw_tracepoint_open(None, program)
    try:
        yield program
    finally:
        os.close(link)
        os.close(program)


def measure(case: Case) -> Iterator[Cost]:
    """Programs of these collectors bear the names of their tracepoints."""
    with ExitStack() as stack:
        programs = stack.enter_context(loaded(case))
        empties = {name: stack.enter_context(empty(name)) for name in programs}
        stack.callback(os.close, libbpf.enable_statistics())
        costs: dict[str, list[Cost]] = {name: [] for name in programs}
        for _ in range(REPEATS):
            before = {fd: libbpf.program_statistics(fd) for fd in (*programs.values(), *empties.values())}
            case.load()
            for name, descriptor in programs.items():
                runs, gross_ns = since(before[descriptor], descriptor)
                costs[name].append(Cost(name, runs, gross_ns, since(before[empties[name]], empties[name])[1]))
        for found in costs.values():
            yield min(found, key=lambda cost: cost.net_ns)


def since(then: ProgramStatistics, program: int) -> tuple[int, float]:
    """Runs, and ns a run."""
    now = libbpf.program_statistics(program)
    runs = now.runs - then.runs
    return runs, (now.run_time_ns - then.run_time_ns) / max(runs, 1)


def ping_pong() -> None:
    with loads.cgroup() as (folder, _), loads.ping_pong(1, 100_000) as jobs, loads.crew(folder, jobs) as crew:
        crew.work()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, loads.loop_device(Path(folder) / "disk") as disk:

        def fio() -> None:
            subprocess.run([*FIO, f"--filename={disk.path}", "--loops=12"], check=True, capture_output=True)

        cases = [
            Case("runqlat", options, forbid, ping_pong)
            for options, forbid in (
                ("by: none", ""), ("by: none, exemplars: false", ""), ("by: cgroup", ""), ("by: none", "tp_btf"),
            )
        ]  # fmt: skip
        cases += [
            Case("biolatency", options, forbid, fio)
            for options, forbid in (("", ""), ("exemplars: false", ""), ("", "tp_btf"))
        ]
        print(f"{'program':<20} {'variant':<30} {'runs':>8} {'gross':>7} {'empty':>7} {'net':>7}   ns a run")
        for case in cases:
            for cost in measure(case):
                print(
                    f"{cost.program:<20} {case.name:<30} {cost.runs:>8} {cost.gross_ns:>7.1f} {cost.empty_ns:>7.1f}"
                    f" {cost.net_ns:>7.1f}"
                )


if __name__ == "__main__":
    main()
