# SPDX-License-Identifier: Apache-2.0
"""runqlat against the kernel's own account, `/proc/PID/schedstat`: known tasks in a cgroup of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from daemon import cgroups
from daemon.histogram import SECONDS
from daemon.model import Distribution
from tests.accuracy import compared
from tests.kernel import load as loads
from tests.kernel.load import Crew, Switches, Waits

pytestmark = pytest.mark.kernel

LATENCY = "bpf_run_queue_latency_seconds"


@pytest.fixture
def group(lacks: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    if cgroups.mount_point() is None:
        lacks("cgroup v2 is not mounted; mount -t cgroup2 none /sys/fs/cgroup")
    if not Path("/proc/self/schedstat").exists():
        lacks("this kernel has no /proc/PID/schedstat; it needs CONFIG_SCHED_INFO")
    with loads.cgroup() as made:
        yield made


class Counted(NamedTuple):
    """What a load added: to the kernel's account of the crew, to our histogram, to the machine's switches."""

    kernel: Waits
    ours: Distribution
    switches: Switches

    def deviation(self) -> float:
        return self.ours.sum * 1e9 / self.kernel.wait_ns - 1

    def print(self, name: str) -> None:
        print(
            f"{name}: {self.ours.count} waits, kernel {self.kernel.count} ({self.switches.unseen} switches unseen); "
            f"{self.ours.sum:.6f} s, kernel {self.kernel.wait_ns / 1e9:.6f} s ({self.deviation() * 100:+.5f} %)"
        )

    def counts_match(self) -> bool:
        """A switch that the kernel does not show to BPF can not be counted (see `loads.witness`)."""
        return self.kernel.count - self.switches.unseen <= self.ours.count <= self.kernel.count


def count(loaded: Any, labels: tuple[str, ...], crew: Crew, beside: Callable[[], None] = lambda: None) -> Counted:
    with loads.switches() as switches:
        seen, before = switches(), loaded.series(LATENCY).get(labels, SECONDS.empty)
        kernel = crew.work(beside)
        after = loaded.series(LATENCY)[labels]
        ours = Distribution((), after.count - before.count, after.sum - before.sum)
        counted = Counted(kernel, ours, switches().since(seen))
        if not counted.switches.unseen:
            compared(loaded, "waits", ours.count, kernel.count)
            compared(loaded, "waited seconds", ours.sum, kernel.wait_ns / 1e9)
        return counted


def fidelity(loaded: Any) -> tuple[str, str]:
    loaded.read()
    program = loaded.engine.status()["collectors"]["runqlat"]["programs"]["sched_switch"]
    return program["hook"], program["fidelity"]


@pytest.fixture(params=["tp_btf", "raw_tp"])
def loaded(request: pytest.FixtureRequest, shared) -> Any:
    """Each hook: tasks remember their last arrival themselves, or a hash does it for them."""
    loaded = shared("runqlat", by="cgroup", forbid="tp_btf" if request.param == "raw_tp" else "")
    assert fidelity(loaded) == (f"{request.param}:sched_switch", "exact")
    return loaded


def test_waits_of_wakeups_are_the_kernels(loaded: Any, group: tuple[Path, str]) -> None:
    """Ping-pong over pipes: one pair, which finds a CPU at once, and four, which wait for each other."""
    folder, path = group
    times = 5_000 if loads.emulated() else 20_000
    for pairs in (1, 4):
        with loads.ping_pong(pairs, times // pairs) as jobs, loads.crew(folder, jobs) as crew:
            counted = count(loaded, (path,), crew)
        counted.print(f"ping-pong, {pairs} pairs")
        assert counted.kernel.count >= times
        assert counted.counts_match()
        assert abs(counted.deviation()) < 0.01
    assert not any(loaded.losses().values())


def test_waits_for_busy_cpus_are_the_kernels(shared, group: tuple[Path, str]) -> None:
    folder, path = group
    loaded = shared("runqlat", by="cgroup")
    with loads.crew(folder, [loads.burn(1.5)] * 8) as crew:
        counted = count(loaded, (path,), crew)
    counted.print("8 burners")
    assert counted.counts_match()
    assert abs(counted.deviation()) < 0.01
    assert not any(loaded.losses().values())


def test_waits_that_migrations_cut_are_whole(loaded: Any, group: tuple[Path, str]) -> None:
    folder, path = group
    with loads.crew(folder, [loads.burn(1.5)] * 8) as crew:
        counted = count(loaded, (path,), crew, lambda: loads.flip(crew.pids, 250, 0.005))
    counted.print("8 burners that migrate")
    assert counted.counts_match()
    assert abs(counted.deviation()) < 0.01


def test_a_tasks_first_wait_is_counted(loaded: Any, group: tuple[Path, str]) -> None:
    """The one between its birth and its first arrival on a CPU; the kernel counts it too."""
    folder, path = group
    with loads.crew(folder, [loads.breed(30, 0.005)]) as crew:
        for _ in range(5):  # an unseen first arrival takes its wait with it
            counted = count(loaded, (path,), crew)
            counted.print("30 tasks that are born")
            assert counted.kernel.count >= 30
            assert counted.counts_match()
            if counted.ours.count == counted.kernel.count:
                break
        assert len(crew.pids) >= 31
    assert abs(counted.deviation()) < 0.01


@pytest.mark.parametrize("by", ["none", "cgroup"])
def test_every_switch_to_a_task_is_counted_and_none_to_idle(load, group: tuple[Path, str], by: str) -> None:
    """Of the whole machine, against a program that only tells the idle task from others."""
    folder, _ = group
    loaded = load("runqlat", by=by)

    def read() -> int:
        return sum(distribution.count for distribution in loaded.series(LATENCY).values())

    with ExitStack() as stack:
        switches = stack.enter_context(loads.switches())
        jobs = stack.enter_context(loads.ping_pong(1, 5_000))
        crew = stack.enter_context(loads.crew(folder, [*jobs, loads.nap(200)]))
        seen = [switches()]
        before = read()
        seen.append(switches())
        kernel = crew.work()
        seen.append(switches())
        ours = read() - before
        seen.append(switches())
    at_least, at_most = seen[2].since(seen[1]), seen[3].since(seen[0])
    print(f"{ours} waits; {at_least.to_tasks} to {at_most.to_tasks} switches to tasks, {at_least.to_idle} to idle")
    assert at_least.to_tasks <= ours <= at_most.to_tasks
    assert ours >= kernel.count - at_most.unseen
    assert not any(loaded.losses().values())


def test_exemplars_name_who_waited(load, group: tuple[Path, str]) -> None:
    folder, path = group
    loaded = load("runqlat", by="cgroup", exemplar_interval="1s")
    with loads.crew(folder, [loads.burn(0.3)] * 6) as crew:
        crew.work()
        pids = {str(pid) for pid in crew.pids}
        comm = Path(f"/proc/{crew.pids[0]}/comm").read_text().strip()
        exemplars = loaded.series(LATENCY)[(path,)].exemplars
    assert exemplars
    for bucket, exemplar in exemplars.items():
        labels = dict(exemplar.labels)
        assert labels["pid"] in pids
        assert (labels["comm"], labels["cgroup"]) == (comm, path)
        assert SECONDS.octave(round(exemplar.value * SECONDS.unit)) == bucket
