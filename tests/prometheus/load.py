# SPDX-License-Identifier: Apache-2.0
"""A small real load of each kind that the collectors count.

It is on a loop device, on loopback, on a wire between two network namespaces that loses packets, in a memory cgroup.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import memory, net
from tests.kernel.net import End

MIB = 1 << 20
_FITS = 8 * MIB  # what the file below the loop device has room for
_REPEATED = 700  # segments: more than two a second for five minutes


@contextmanager
def loop_device(folder: Path) -> Iterator[Path]:
    """A disk of 64 MiB of which 8 can be written: beyond them it gives errors."""
    with ExitStack() as undo:
        _command("mount", "-t", "tmpfs", "-o", f"size={_FITS}", "tmpfs", folder)
        undo.callback(_command, "umount", folder)
        file = folder / "disk"
        file.touch()
        os.truncate(file, 64 * MIB)
        device = _command("losetup", "--find", "--show", file)
        undo.callback(_command, "losetup", "--detach", device)
        yield Path(device)


def _command(*words: str | Path) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def disk(device: Path) -> None:
    """Reads and writes past the page cache, and errors."""
    block = mmap.mmap(-1, MIB)
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        for number in range(64):
            os.preadv(descriptor, [memoryview(block)[:4096]], number * 4096)
            os.pwritev(descriptor, [memoryview(block)[:4096]], number * 4096)
        for number in range(16, 32):
            with contextlib.suppress(OSError):
                os.pwritev(descriptor, [block], number * MIB)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def page_cache(device: Path) -> None:
    """Misses, then hits, then dirty pages."""
    descriptor = os.open(device, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(3):
            os.pread(descriptor, MIB, 0)
        os.pwrite(descriptor, bytes(64 << 10), 0)
    finally:
        os.close(descriptor)


def connections(count: int) -> None:
    """Connections on loopback that carry some bytes each way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
                client.sendall(b"question")
                accepted.recv(64)
                accepted.sendall(b"answer" * 100)
                client.recv(1024)


@contextmanager
def unanswered() -> Iterator[None]:
    """Handshakes that a listener with a full queue does not answer: their SYNs are sent again after a second."""
    with ExitStack() as undo:
        server = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            client = undo.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Processes that always want a CPU."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def oom_kill() -> str:
    """A process that its memory cgroup's limit kills; its cgroup, or nothing where there is no memory controller."""
    name = f"bpfmetricsd-{os.getpid()}-load"
    try:
        memory.oom_kill(name)
    except OSError:
        return ""
    return f"/{name}"


def lose(ends: tuple[End, End]) -> float:
    """Segments over a wire that loses one packet in ten, until some hundreds were sent again; their share, as the
    kernel counts it."""
    near, far = ends
    for end in ends:
        end.single_packets()
        end.retransmit_after("5ms")
    before = near.counters()
    source, sink = net.connect(near, far, "ipv4")
    with source, sink, far.random_loss(0.1):
        while (repeated := near.counters()["Tcp.RetransSegs"] - before["Tcp.RetransSegs"]) < _REPEATED:
            net.move(source, sink, 64 << 10)
            time.sleep(0.01)
    return repeated / (near.counters()["Tcp.OutSegs"] - before["Tcp.OutSegs"])


def lose_no_more(ends: tuple[End, End]) -> None:
    """So many segments that those of `lose` are a small share of them."""
    source, sink = net.connect(*ends, "ipv4")
    with source, sink:
        for _ in range(_REPEATED // 4):
            net.move(source, sink, MIB)


@dataclass(frozen=True)
class Done:
    """What the load did: the cgroup of the OOM kill, if there was one, and the share of segments sent again."""

    killed: str
    repeated: float


def run(folder: Path, ends: tuple[End, End], seconds: float) -> Done:
    """Everything at once for some seconds, with an OOM kill in the middle."""
    with loop_device(folder) as device, unanswered(), spinning(4), ThreadPoolExecutor() as pool:
        began = time.monotonic()
        losing = pool.submit(lose, ends)
        killed = None
        while time.monotonic() - began < seconds:
            disk(device)
            page_cache(device)
            connections(5)
            if killed is None and time.monotonic() - began > seconds / 2:
                killed = oom_kill()
            time.sleep(0.1)
        return Done(killed or "", losing.result())
