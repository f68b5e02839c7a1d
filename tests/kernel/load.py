# SPDX-License-Identifier: Apache-2.0
"""Loads that the tests of this folder make, and the kernel's own accounts of them. What sets something up undoes it."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from daemon import cgroups, libbpf
from daemon.btf import Btf
from daemon.compiler import compile_text

_BLKDISCARD = 0x1277  # include/uapi/linux/fs.h: _IO(0x12, 119)


def emulated() -> bool:
    """Whether the machine is one of tests/vm, which is slow, and may run out of memory as a whole."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


class DiskStat(NamedTuple):
    """/sys/block/<disk>/stat (Documentation/block/stat.rst): sectors have 512 bytes, ticks are milliseconds."""

    reads: int
    read_merges: int
    read_sectors: int
    read_ticks: int
    writes: int
    write_merges: int
    write_sectors: int
    write_ticks: int
    in_flight: int
    io_ticks: int
    time_in_queue: int
    discards: int
    discard_merges: int
    discard_sectors: int
    discard_ticks: int
    flushes: int
    flush_ticks: int

    def since(self, before: DiskStat) -> DiskStat:
        return DiskStat(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Disk:
    """A loop device of the test's own, on a file."""

    path: Path
    file: Path

    @property
    def name(self) -> str:
        return self.path.name

    def stat(self) -> DiskStat:
        return disk_stat(self.name)

    def read(self, count: int, size: int = 4096, first: int = 0) -> int:
        """Direct reads by this process, one after the other; how many failed with EIO."""
        failed = 0
        with _opened(self.path, os.O_RDONLY | os.O_DIRECT) as disk, mmap.mmap(-1, size) as buffer:
            for number in range(count):
                try:
                    os.preadv(disk, [buffer], first + number * size)
                except OSError:
                    failed += 1
        return failed

    def write(self, count: int, size: int = 4096) -> None:
        """Direct writes by this process."""
        with _opened(self.path, os.O_WRONLY | os.O_DIRECT) as disk, mmap.mmap(-1, size) as buffer:
            for number in range(count):
                os.pwritev(disk, [buffer], number * size)

    def flush(self, count: int) -> None:
        """Empties the write cache: fsync of a block device sends a flush, also when nothing was written."""
        with _opened(self.path, os.O_WRONLY) as disk:
            for _ in range(count):
                os.fsync(disk)

    def discard(self, count: int, size: int = 1 << 16) -> None:
        with _opened(self.path, os.O_WRONLY) as disk:
            for number in range(count):
                fcntl.ioctl(disk, _BLKDISCARD, struct.pack("QQ", number * size, size))


def disk_stat(name: str) -> DiskStat:
    return DiskStat(*map(int, Path(f"/sys/block/{name}/stat").read_text().split()[:17]))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def loop_device(file: Path, size: int = 64 << 20, *, direct: bool = False) -> Iterator[Disk]:
    """A loop device on a new file.

    With `direct`, which not every file system has, reads behind the file's end fail; older kernels else fill in zeros.
    """
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)
    command = ["losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", file]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    path = Path(made.stdout.strip())
    try:
        if shutil.which("udevadm"):
            subprocess.run(["udevadm", "settle"], check=False)  # udev has a look at each new disk
        yield Disk(path, file)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)
        file.unlink()


_WITNESS = """
BPF_ARRAY(seen, u64, 2);
int completed(unsigned long long *ctx)
{
	struct request *rq = (void *)ctx[0];
#ifdef HAVE_request_rq_disk
	struct gendisk *disk = rq->rq_disk;
#else
	struct request_queue *q = rq->q;
	struct gendisk *disk = q->disk;
#endif
	int which = rq->cmd_flags & 1;
	u64 *count;

	if (disk->major != MAJOR || disk->first_minor != MINOR || (u32)ctx[2] < rq->__data_len)
		return 0;
	if ((rq->cmd_flags & 0xff) == REQ_OP_FLUSH)
		return 0;
	count = seen.lookup(&which);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
"""


@contextmanager
def witness(disk: Disk) -> Iterator[Callable[[], tuple[int, int]]]:
    """Counts completions on a loop device with the smallest of programs: operations that read, that write; no flushes.

    What a test may expect of BPF at all: kernels of sandboxes run no BPF program while a process of the sandbox itself
    is the current one, and a completion that interrupts such a process is then invisible to every program.
    """
    fields = {
        "request": ("q", "rq_disk?", "cmd_flags", "__data_len"), "request_queue": ("disk?",),
        "gendisk": ("major", "first_minor"),
    }  # fmt: skip
    device = disk.path.stat().st_rdev
    flags = [f"-DMAJOR={os.major(device)}", f"-DMINOR={os.minor(device)}"]
    compiled = compile_text(Btf().header(fields, ("req_op|req_opf.REQ_OP_FLUSH",)).text + _WITNESS, flags)
    target = libbpf.vmlinux_btf_id("block_rq_complete", libbpf.ATTACH_TRACE_RAW_TP)
    program = libbpf.prog_load(
        "witness", libbpf.PROG_TYPE_TRACING, compiled.functions["completed"], libbpf.ATTACH_TRACE_RAW_TP, target
    )
    link = libbpf.raw_tracepoint_open(None, program)

    def read() -> tuple[int, int]:
        raw = [libbpf.map_lookup(compiled.maps["seen"].descriptor, struct.pack("I", which), 8) for which in (0, 1)]
        reads, writes = (struct.unpack("Q", one or bytes(8))[0] for one in raw)
        return reads, writes

    try:
        yield read
    finally:
        os.close(link)
        os.close(program)


_SWITCHES = """
BPF_PERCPU_ARRAY(seen, u64, 2);
int switched(unsigned long long *ctx)
{
	struct task_struct *next = (void *)ctx[2];
	int which = next->pid == 0;
	u64 *count = seen.lookup(&which);

	if (count)
		*count += 1;
	return 0;
}
"""


class Switches(NamedTuple):
    """Context switches of the whole machine: all that there were, and those that BPF saw, to tasks and to idle."""

    all: int
    to_tasks: int
    to_idle: int

    def since(self, before: Switches) -> Switches:
        return Switches(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def unseen(self) -> int:
        """Those that the kernel kept from BPF, and a few of the moment between two readings."""
        return abs(self.all - self.to_tasks - self.to_idle)


@contextmanager
def switches() -> Iterator[Callable[[], Switches]]:
    """Counts context switches with the smallest of programs; `all` is the kernel's own count (ctxt in /proc/stat)."""
    compiled = compile_text(Btf().header({"task_struct": ("pid",)}, ()).text + _SWITCHES, ())
    seen = compiled.maps["seen"].descriptor
    target = libbpf.vmlinux_btf_id("sched_switch", libbpf.ATTACH_TRACE_RAW_TP)
    code = compiled.functions["switched"]
    program = libbpf.prog_load("switched", libbpf.PROG_TYPE_TRACING, code, libbpf.ATTACH_TRACE_RAW_TP, target)
    link = libbpf.raw_tracepoint_open(None, program)
    cpus = libbpf.possible_cpus()

    def read() -> Switches:
        raw = [libbpf.map_lookup(seen, struct.pack("I", which), 8 * cpus) for which in (0, 1)]
        to_tasks, to_idle = (sum(struct.unpack(f"{cpus}Q", one or bytes(8 * cpus))) for one in raw)
        (line,) = [line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("ctxt ")]
        return Switches(int(line.split()[1]), to_tasks, to_idle)

    try:
        yield read
    finally:
        os.close(link)
        os.close(program)


class Waits(NamedTuple):
    """/proc/PID/schedstat of some tasks, summed up: time runnable without a CPU, and how often they then got one."""

    wait_ns: int
    count: int

    def since(self, before: Waits) -> Waits:
        return Waits(self.wait_ns - before.wait_ns, self.count - before.count)


class Crew:
    """Processes in a cgroup of their own, that work when told to, and sleep before and after.

    Who reads the accounts is outside of the cgroup, and does it while all inside are asleep.
    """

    def __init__(self, folder: Path, jobs: Sequence[Callable[[], None]]) -> None:
        self._folder = folder
        self._done, done = os.pipe()
        self._own: dict[int, int] = {}  # pid to the pipe that tells it to work: of a common one, the first took two
        for job in jobs:
            self._start(job, done)
        os.close(done)
        self.asleep()

    def _start(self, job: Callable[[], None], done: int) -> None:
        wait, go = os.pipe()
        pid = os.fork()
        if pid:
            os.close(wait)
            self._own[pid] = go
            (self._folder / "cgroup.procs").write_text(str(pid))
            return
        try:
            for other in (go, *self._own.values()):
                os.close(other)
            while os.read(wait, 1):
                job()
                os.write(done, b".")
        finally:
            os._exit(0)

    @property
    def pids(self) -> list[int]:
        """All in the cgroup, also what the jobs started."""
        return [int(line) for line in (self._folder / "cgroup.procs").read_text().split()]

    def work(self, beside: Callable[[], None] = lambda: None) -> Waits:
        """Lets all of them work, and does something beside it; what their waits were to the kernel."""
        before = self.asleep()
        for go in self._own.values():
            os.write(go, b".")
        beside()
        for _ in self._own:
            assert os.read(self._done, 1) == b"."
        return self.asleep().since(before)

    def asleep(self) -> Waits:
        """Comes back when all are asleep, with the sum of their accounts."""
        for pid in self.pids:
            while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "S":
                time.sleep(0.001)
        accounts = [Path(f"/proc/{pid}/schedstat").read_text().split() for pid in self.pids]
        return Waits(sum(int(fields[1]) for fields in accounts), sum(int(fields[2]) for fields in accounts))

    def end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid, go in self._own.items():
            os.waitpid(pid, 0)
            os.close(go)
        os.close(self._done)


@contextmanager
def cgroup() -> Iterator[tuple[Path, str]]:
    """A cgroup v2 of the test's own: its folder, and its path in metrics."""
    root = cgroups.mount_point()
    assert root is not None
    folder = root / f"bpfmetricsd_test_{os.getpid()}_{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder, f"/{folder.name}"
    finally:
        while "populated 1" in (folder / "cgroup.events").read_text():
            time.sleep(0.001)
        folder.rmdir()


@contextmanager
def crew(folder: Path, jobs: Sequence[Callable[[], None]]) -> Iterator[Crew]:
    made = Crew(folder, jobs)
    try:
        yield made
    finally:
        made.end()


def burn(seconds: float) -> Callable[[], None]:
    """Keeps a CPU busy."""

    def job() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    return job


def nap(times: int) -> Callable[[], None]:
    """Sleeps and wakes up."""

    def job() -> None:
        for _ in range(times):
            time.sleep(0.0005)

    return job


def breed(children: int, seconds: float) -> Callable[[], None]:
    """Starts processes that each keep a CPU busy for a while, and then sleep for ever."""

    def job() -> None:
        for _ in range(children):
            if os.fork() == 0:
                burn(seconds)()
                while True:
                    signal.pause()

    return job


@contextmanager
def ping_pong(pairs: int, rounds: int) -> Iterator[list[Callable[[], None]]]:
    """Pairs of jobs that send each other a byte to and fro over two pipes."""
    jobs, descriptors = [], []
    for _ in range(pairs):
        there, back = os.pipe(), os.pipe()
        descriptors += [*there, *back]
        jobs += [_sender(there[1], back[0], rounds), _returner(back[1], there[0], rounds)]
    try:
        yield jobs
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _sender(out: int, back: int, rounds: int) -> Callable[[], None]:
    def job() -> None:
        for _ in range(rounds):
            os.write(out, b".")
            os.read(back, 1)

    return job


def _returner(out: int, there: int, rounds: int) -> Callable[[], None]:
    def job() -> None:
        for _ in range(rounds):
            os.read(there, 1)
            os.write(out, b".")

    return job


def flip(pids: Sequence[int], times: int, pause_s: float) -> None:
    """Sends every process to the next CPU, again and again, whether it runs or waits; in the end all are free again."""
    cpus = sorted(os.sched_getaffinity(0))
    for turn in range(times):
        for number, pid in enumerate(pids):
            os.sched_setaffinity(pid, {cpus[(turn + number) % len(cpus)]})
        time.sleep(pause_s)
    for pid in pids:
        os.sched_setaffinity(pid, cpus)
