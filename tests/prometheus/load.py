# SPDX-License-Identifier: Apache-2.0
"""A small real load of each kind that the collectors count, on a loop device, loopback and in a memory cgroup."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

MIB = 1 << 20
_FITS = 8 * MIB  # what the file below the loop device has room for
_CGROUP = Path("/sys/fs/cgroup")
_EAT = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); bytearray(256 << 20)"


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


def oom_kill() -> bool:
    """A process that its memory cgroup's limit kills; False where there is no memory controller."""
    for root, limit in ((_CGROUP / "memory", "memory.limit_in_bytes"), (_CGROUP, "memory.max")):
        group = root / f"bpfmetricsd_test_{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
        if (group / limit).exists():
            break
        with contextlib.suppress(OSError):
            group.rmdir()
    else:
        return False
    try:
        (group / limit).write_text(str(32 * MIB))
        done = subprocess.run([sys.executable, "-c", _EAT, str(group / "cgroup.procs")])
        assert done.returncode == -signal.SIGKILL
        return True
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A cgroup stays busy for a moment after its last process."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    group.rmdir()


def run(folder: Path, seconds: float) -> None:
    """Everything at once for some seconds, with an OOM kill in the middle."""
    with loop_device(folder) as device, unanswered(), spinning(4):
        began = time.monotonic()
        killed = False
        while time.monotonic() - began < seconds:
            disk(device)
            page_cache(device)
            connections(5)
            if not killed and time.monotonic() - began > seconds / 2:
                killed = True
                oom_kill()
            time.sleep(0.1)
