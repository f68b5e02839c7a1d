# SPDX-License-Identifier: Apache-2.0
"""A host that does its work, and one of whose disks then answers late."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.kernel.load import Disk, loop_device

WRITERS = 6
FROZEN_SECONDS = 0.6


@contextmanager
def disk(folder: Path) -> Iterator[tuple[Disk, Path]]:
    """A disk on a file of a file system of its own, and where that is mounted: frozen, the disk answers no write."""
    mount = folder / "below"
    mount.mkdir()
    with ExitStack() as undo:
        lower = undo.enter_context(loop_device(folder / "lower"))
        subprocess.run(["mkfs.ext4", "-q", lower.path], check=True)
        subprocess.run(["mount", lower.path, mount], check=True)
        undo.callback(subprocess.run, ["umount", mount], check=True)
        yield undo.enter_context(loop_device(mount / "upper", 16 << 20)), mount


@contextmanager
def beside(*jobs: Callable[[], None]) -> Iterator[None]:
    """Each again and again in a thread of its own, with a little pause."""
    end = threading.Event()

    def repeat(job: Callable[[], None]) -> None:
        while not end.is_set():
            job()
            end.wait(0.05)

    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        end.set()
        for one in threads:
            one.join()


def work(one: Disk) -> list[Callable[[], None]]:
    """Writes to the disk, reads through the page cache, connections on loopback."""

    def write() -> None:
        with mmap.mmap(-1, 4096) as block:
            descriptor = os.open(one.path, os.O_WRONLY | os.O_DIRECT)
            try:
                os.pwrite(descriptor, block, 0)
            finally:
                os.close(descriptor)

    def read() -> None:
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
            path.read_bytes()

    def connect() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            for _ in range(2):
                with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
                    client.sendall(b"question")
                    accepted.recv(64)
                    accepted.sendall(b"answer" * 200)
                    client.recv(4096)

    return [write] * WRITERS + [read, connect]


def freeze(mount: Path) -> Callable[[], None]:
    def job() -> None:
        subprocess.run(["fsfreeze", "--freeze", mount], check=True)
        try:
            time.sleep(FROZEN_SECONDS)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", mount], check=True)

    return job
