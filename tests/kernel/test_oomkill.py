# SPDX-License-Identifier: Apache-2.0
"""OOM kills against the kernel's own count and its log.

The machine's own end of memory is tried in guests (tests/vm) only.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from collectors import oomkill
from daemon import cgroups
from tests.accuracy import compared
from tests.kernel.load import emulated
from tests.kernel.memory import (
    LIMIT_BYTES,
    V1_FREEZER,
    V1_MEMORY,
    big_eater,
    control,
    eater,
    folder,
    kills_of,
    limited,
    named,
    oom_kill,
    process,
)

pytestmark = pytest.mark.kernel
KILLS = "bpf_oom_kills"
TRACING = Path("/sys/kernel/tracing")
Load = Callable[..., Any]


def vmstat() -> int:
    return oomkill._kills(Path("/proc/vmstat").read_text())


def logged() -> dict[int, int]:
    """Resident bytes of the victims in the kernel's log, by pid."""
    text = subprocess.run(["dmesg"], check=True, capture_output=True, text=True, errors="replace").stdout
    found = {}
    for line in text.splitlines():
        match = re.search(r"Killed process (\d+) .*anon-rss:(\d+)kB, file-rss:(\d+)kB, shmem-rss:(\d+)kB", line)
        if match:
            pid, *kilobytes = map(int, match.groups())
            found[pid] = sum(kilobytes) << 10
    return found


def group(name: str) -> str:
    """A name for a cgroup that nobody else has: the metric covers the whole machine."""
    return f"bpfmetricsd-{os.getpid()}-{name}"


def kills(loaded: Any) -> dict[str, int]:
    """By cgroup, of this test's own."""
    found = loaded.series(KILLS)
    return {path: count for (scope, path), count in found.items() if group("") in path and scope == "memcg"}


def agrees(loaded: Any, killed: int) -> None:
    """All kills, for nobody else runs out of memory meanwhile."""
    ours = sum(loaded.series(KILLS).values())
    compared(loaded, "kills", ours, killed)
    assert ours == killed
    assert loaded.engine.status()["collectors"]["oomkill"]["coverage"] == 1.0


def pids(loaded: Any) -> list[int]:
    """Of the events, of this test's own cgroups."""
    loaded.engine.drain()
    return [event.fields["pid"] for event in loaded.events if group("") in event.fields["cgroup"]]


@pytest.mark.parametrize("forbid", ["", "tp_btf"])
def test_kills_equal_the_kernels_count_by_the_victims_cgroup(load: Load, forbid: str) -> None:
    """The groups are gone when the counts are read."""
    loaded = load("oomkill", forbid=forbid)
    assert loaded.series(KILLS) == {(scope, "other"): 0 for scope in oomkill.SCOPES}
    before = vmstat()
    for _ in range(3):
        oom_kill(group("a.service"))
    oom_kill(group("b.slice"))
    assert kills(loaded) == {f"/{group('a.service')}": 3, f"/{group('b.slice')}": 1}
    agrees(loaded, vmstat() - before)
    assert not any(loaded.losses().values())


def test_count_equals_that_of_the_memory_cgroup(load: Load) -> None:
    """Several processes of one group; each kill is in `oom_control` (v1) or `memory.events` (v2) of it."""
    loaded = load("oomkill")
    with limited(group("many.scope")) as groups:
        for _ in range(3):
            with process(groups, *eater(4 * LIMIT_BYTES)) as victim:
                assert victim.wait(60) == -signal.SIGKILL
        truth = groups[0] / ("memory.oom_control" if V1_MEMORY.is_dir() else "memory.events")
        counted = int(dict(line.split() for line in truth.read_text().splitlines())["oom_kill"])
    ours = kills(loaded)[f"/{group('many.scope')}"]
    compared(loaded, "kills", ours, counted)
    assert ours == counted == 3


def test_event_has_every_fact(load: Load) -> None:
    loaded = load("oomkill")
    name = group("c.service")
    pid = oom_kill(name)
    loaded.engine.drain()
    (event,) = [event for event in loaded.events if event.fields["pid"] == pid]
    assert event.message_id == oomkill.MESSAGE_ID
    facts = event.fields
    assert (facts["cgroup"], facts["unit"], facts["scope"]) == (f"/{name}", name, "memcg")
    assert facts["comm"].startswith("python")
    assert (facts["killer_pid"], facts["killer_comm"]) == (pid, facts["comm"]), "its own allocation led to it"
    assert facts["rss_bytes"] == pytest.approx(logged()[pid], rel=0.01)
    assert facts["rss_bytes"] == facts["anon_bytes"] + facts["file_bytes"] + facts["shmem_bytes"]
    assert LIMIT_BYTES / 2 < facts["anon_bytes"] < LIMIT_BYTES * 2


def test_events_wait_for_a_reader_and_keep_their_times(load: Load) -> None:
    """Nothing has opened the ring buffer while these happen."""
    loaded = load("oomkill")
    assert not loaded.events
    times = {}
    for name in ("one", "two"):
        began = time.time()
        pid = oom_kill(group(name))
        times[pid] = (began, time.time())
        time.sleep(0.5)
    assert pids(loaded) == list(times)
    found = {event.fields["pid"]: event.timestamp for event in loaded.events}
    for pid, (began, ended) in times.items():
        assert began - 0.1 <= found[pid] <= ended + 0.1
    assert pids(loaded) == list(times), "each once"


def test_exemplar_names_the_victim(load: Load) -> None:
    loaded = load("oomkill")
    pid = oom_kill(group("d.service"))
    (series,) = [one for one in loaded.read()[KILLS].series if one.labels == ("memcg", f"/{group('d.service')}")]
    assert series.exemplar
    assert series.exemplar.value == 1
    labels = dict(series.exemplar.labels)
    assert labels["pid"] == str(pid)
    assert labels["comm"].startswith("python")


@pytest.mark.parametrize("name", [b"a\n\"'<script>\\", b"\xc3\xa4 \xff", b" ", b"fifteen letters"])
def test_odd_names(load: Load, name: bytes) -> None:
    loaded = load("oomkill")
    path = group('we"ird \\ nä{me}.service')
    pid = oom_kill(path, named(name, 4 * LIMIT_BYTES))
    loaded.engine.drain()
    facts = next(event.fields for event in loaded.events if event.fields["pid"] == pid)
    assert facts["comm"] == name.decode(errors="replace")
    assert facts["unit"] == path
    (series,) = [one for one in loaded.read()[KILLS].series if one.labels == ("memcg", f"/{path}")]
    assert ("comm", name.decode(errors="replace")) in series.exemplar.labels


def test_the_name_of_a_container(load: Load) -> None:
    """The longest that a container runtime gives."""
    loaded = load("oomkill")
    path = f"crio-conmon-{os.getpid():064}.scope"
    oom_kill(path)
    assert loaded.series(KILLS)["memcg", f"/{path}"] == 1


@pytest.mark.parametrize(("levels", "shown"), [(12, 12), (13, 12), (15, 12)])
def test_a_deep_path_loses_its_outermost_parts(load: Load, levels: int, shown: int) -> None:
    root = cgroups.mount_point()
    assert root
    parts = [group("outermost"), *(f"level-{number}" for number in range(2, levels)), group("leaf")]
    loaded = load("oomkill")
    with ExitStack() as undo:
        for depth in range(1, levels):
            undo.enter_context(folder(root.joinpath(*parts[:depth])))
        oom_kill("/".join(parts))
    (path,) = [path for _, path in loaded.series(KILLS) if path.endswith(parts[-1])]
    assert path == ("…" if levels > shown else "") + "/" + "/".join(parts[-shown:])


THREADS = """
import ctypes, sys, threading, time
def eat():
    time.sleep(0.2)
    print(threading.get_native_id(), flush=True)
    bytearray(int(sys.argv[1]))
for _ in range(3):
    threading.Thread(target=eat).start()
"""
LEADER_ENDS = "ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone"


@pytest.mark.parametrize("then", ["time.sleep(60)", LEADER_ENDS], ids=["all alive", "leader gone"])
def test_a_process_of_many_threads_is_one_kill_by_its_own_id(load: Load, then: str) -> None:
    loaded = load("oomkill")
    pid = oom_kill(group("threads"), (sys.executable, "-S", "-c", THREADS + then, str(4 * LIMIT_BYTES)))
    assert pids(loaded) == [pid]
    assert list(kills(loaded).values()) == [1]


@contextmanager
def marked_victims() -> Iterator[Callable[[int], int]]:
    """Gives a function that says how often the tracepoint has fired for a process."""
    instance = TRACING / "instances" / f"bpfmetricsd_test_{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "events/oom/mark_victim/enable").write_text("1")
        yield lambda pid: (instance / "trace").read_text().count(f"mark_victim: pid={pid} ")
    finally:
        (instance / "events/oom/mark_victim/enable").write_text("0")
        instance.rmdir()


def test_a_task_that_is_exiting_already_is_not_killed_again(load: Load, lacks: Callable[[str], NoReturn]) -> None:
    """One process is killed by a user and can not end, because it is frozen. Then its group runs out of memory: the
    kernel marks it, so that it thaws and ends, but that is no kill.
    """
    if not V1_FREEZER.is_dir() or not V1_MEMORY.is_dir():
        lacks("this kernel has the freezer of cgroup v2 only, which lets a killed task end")
    if not TRACING.is_dir():
        lacks(f"{TRACING} is not mounted; mount -t tracefs tracefs {TRACING}")
    loaded = load("oomkill")
    before = vmstat()
    half = LIMIT_BYTES // 2
    with ExitStack() as undo:
        groups = undo.enter_context(limited(group("exiting")))
        freezer = undo.enter_context(folder(V1_FREEZER / group("frozen")))
        marks = undo.enter_context(marked_victims())
        exiting = undo.enter_context(process((*groups, freezer), *eater(half)))
        undo.callback((freezer / "freezer.state").write_text, "THAWED")
        assert exiting.stdout
        assert exiting.stdout.readline() == b"\n"
        Path(f"/proc/{exiting.pid}/oom_score_adj").write_text("500")
        (freezer / "freezer.state").write_text("FROZEN")
        exiting.kill()
        time.sleep(0.1)
        assert exiting.poll() is None
        other = undo.enter_context(process(groups, *eater(half + half // 2)))
        assert other.stdout
        # The kernel may find the memory of the first not free soon enough, and kill the second as well.
        survived = other.stdout.readline() == b"\n"
        killed = [] if survived else [other.pid]
        assert exiting.wait(10) == -signal.SIGKILL
        assert marks(exiting.pid) == 1
        assert [marks(pid) for pid in killed] == [1] * len(killed)
    assert pids(loaded) == killed
    assert len(killed) == vmstat() - before
    agrees(loaded, len(killed))


def test_kills_that_are_not_for_memory(load: Load) -> None:
    """By kill(2), by cgroup.kill, and by the kernel itself for another reason."""
    loaded = load("oomkill")
    before = vmstat()
    root = cgroups.mount_point()
    assert root
    with folder(root / group("killed")) as killed:
        for _ in range(20):
            with process((killed,), "sleep", "60") as victim:
                victim.kill()
                assert victim.wait() == -signal.SIGKILL
        if (killed / "cgroup.kill").exists():  # since 5.14
            with process((killed,), "sleep", "60") as victim:
                (killed / "cgroup.kill").write_text("1")
                assert victim.wait() == -signal.SIGKILL
        with process((killed,), sys.executable, "-S", "-c", "while True: pass") as victim:
            resource.prlimit(victim.pid, resource.RLIMIT_CPU, (1, 1))
            assert victim.wait() == -signal.SIGKILL
    assert not pids(loaded)
    assert not kills(loaded)
    agrees(loaded, vmstat() - before)


@pytest.fixture
def root(lacks: Callable[[str], NoReturn]) -> Path:
    """The root of cgroup v2, where that has the memory controller."""
    found = cgroups.mount_point()
    if found is None or "memory" not in (found / "cgroup.controllers").read_text().split():
        lacks("this kernel has its memory controller in cgroup v1 or nowhere; boot with cgroup_no_v1=all")
    return found


def facts(loaded: Any, *names: str) -> dict[int, list[Any]]:
    """Of the events of this test's own cgroups, by pid."""
    pids(loaded)
    own = [event.fields for event in loaded.events if group("") in event.fields["cgroup"]]
    return {one["pid"]: [one[name] for name in names] for one in own}


def test_the_victim_of_another_groups_allocation(load: Load, root: Path) -> None:
    """Two groups below one with a limit: one allocates, the other's process is killed."""
    loaded = load("oomkill")
    before = vmstat()
    path = f"/{group('nest')}"
    with ExitStack() as undo:
        nest, victims, others = (
            undo.enter_context(folder(root / f"{path[1:]}{below}")) for below in ("", "/victim.scope", "/other.scope")
        )
        control(victims)
        (nest / "memory.max").write_text(str(LIMIT_BYTES))
        victim = undo.enter_context(process((victims,), *eater(LIMIT_BYTES // 2), score=1000))
        assert victim.stdout
        assert victim.stdout.readline() == b"\n"
        other = undo.enter_context(process((others,), *named(b"the other", LIMIT_BYTES // 2 + (4 << 20))))
        assert other.stdout
        # The kernel may find the memory of the first not free soon enough, and kill the second as well.
        also = 0 if other.stdout.readline() == b"\n" else 1
        assert victim.wait(60) == -signal.SIGKILL
        assert [kills_of(one) for one in (nest, victims, others)] == [1 + also, 1, also]
    assert vmstat() - before == 1 + also
    agrees(loaded, 1 + also)
    assert kills(loaded) == {f"{path}/victim.scope": 1} | ({f"{path}/other.scope": 1} if also else {})
    names = ("cgroup", "scope", "killer_pid", "killer_comm", "oom_score_adj")
    found = facts(loaded, *names)
    assert found.pop(victim.pid) == [f"{path}/victim.scope", "memcg", other.pid, "the other", 1000]
    assert found == ({other.pid: [f"{path}/other.scope", "memcg", other.pid, "the other", 0]} if also else {})
    assert facts(loaded, "rss_bytes")[victim.pid] == pytest.approx([logged()[victim.pid]], rel=0.01)


def test_a_group_that_is_killed_as_a_whole(load: Load, root: Path) -> None:
    """`memory.oom.group`: each process is a kill, in its own group, by the one whose allocation led to it.

    The kernel counts its first victim twice: as the victim, and as a member of the group (mm/oom_kill.c:
    oom_kill_memcg_member). We count processes.
    """
    loaded = load("oomkill")
    before = vmstat()
    path = f"/{group('whole')}"
    with ExitStack() as undo:
        whole, eating, asleep = (
            undo.enter_context(folder(root / f"{path[1:]}{below}")) for below in ("", "/eating", "/asleep")
        )
        control(eating)
        (whole / "memory.oom.group").write_text("1")
        (whole / "memory.max").write_text(str(LIMIT_BYTES))
        sleepers = [undo.enter_context(process((asleep,), "sleep", "60")) for _ in range(3)]
        victim = undo.enter_context(process((eating,), *eater(4 * LIMIT_BYTES)))
        assert [one.wait(60) for one in (victim, *sleepers)] == [-signal.SIGKILL] * 4
        counted = [kills_of(one) for one in (whole, eating, asleep)]
    found = {victim.pid: [f"{path}/eating", "memcg", victim.pid]}
    found |= {one.pid: [f"{path}/asleep", "memcg", victim.pid] for one in sleepers}
    assert facts(loaded, "cgroup", "scope", "killer_pid") == found
    assert kills(loaded) == {f"{path}/eating": 1, f"{path}/asleep": 3}
    assert counted == [1 + 4, 1 + 1, 3]
    assert vmstat() - before == 1 + 4
    agrees(loaded, 4)


def test_the_machine_runs_out_of_memory(load: Load, root: Path, lacks: Callable[[str], NoReturn]) -> None:
    if not emulated():
        lacks("this kernel has a machine of its own to lose; make test-vm runs guests out of memory")
    loaded = load("oomkill")
    before = vmstat()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = f"/{group('big.service')}"
    with folder(root / path[1:]) as big:
        control(big)
        with process((big,), *big_eater(total), score=1000) as victim:
            assert victim.wait(120) == -signal.SIGKILL
        assert kills_of(big) == 1
    assert vmstat() - before == 1
    agrees(loaded, 1)
    assert loaded.series(KILLS)["global", path] == 1
    assert facts(loaded, "cgroup", "scope", "oom_score_adj") == {victim.pid: [path, "global", 1000]}
    (event,) = [event for event in loaded.events if event.fields["pid"] == victim.pid]
    assert event.message.endswith("was killed because the machine ran out of memory")
    assert event.fields["rss_bytes"] == pytest.approx(logged()[victim.pid], rel=0.01)


def test_a_kill_that_a_person_asked_for(load: Load, root: Path, lacks: Callable[[str], NoReturn]) -> None:
    """SysRq-F: the machine's own OOM killer, run by a kernel thread."""
    if not emulated():
        lacks("this kernel would choose among all processes of the machine; make test-vm lets it do so in guests")
    loaded = load("oomkill")
    path = f"/{group('asked.service')}"
    with folder(root / path[1:]) as asked, process((asked,), *eater(LIMIT_BYTES), score=1000) as victim:
        assert victim.stdout
        assert victim.stdout.readline() == b"\n"
        Path("/proc/sysrq-trigger").write_text("f")
        assert victim.wait(60) == -signal.SIGKILL
    assert loaded.series(KILLS)["global", path] == 1
    ((seen, scope, killer),) = facts(loaded, "cgroup", "scope", "killer_comm").values()
    assert (seen, scope) == (path, "global")
    assert killer.startswith("kworker")
