# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces joined by a veth pair, losses between them, and the kernel's own TCP counters.

A socket belongs to the namespace that its thread was in when it was made, so the tests need no processes of their own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

LISTEN, TIME_WAIT = "0A", "06"  # as /proc/net/tcp writes them
TOOLS = {"ip": "iproute2", "iptables": "iptables", "ip6tables": "iptables"}


def counters() -> dict[str, int]:
    """`Tcp.RetransSegs`, `TcpExt.TCPSynRetrans` and their like, of the namespace that this thread is in."""
    found = {}
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            prefix = names.split(":")[0]
            found |= {f"{prefix}.{key}": int(value) for key, value in zip(names.split()[1:], values.split()[1:], strict=True)}
    return found


@contextmanager
def _entered(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _setns(inside)
        try:
            yield
        finally:
            _setns(before)
    finally:
        os.close(inside)
        os.close(before)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@dataclass(frozen=True)
class Namespace:
    """One end: its addresses, its device, and what is done inside it."""

    name: str
    ipv4: str
    ipv6: str
    device: str

    def inside(self) -> AbstractContextManager[None]:
        """Sockets made under it belong to this namespace."""
        return _entered(self.name)

    def run(self, *words: str) -> None:
        _run("ip", "netns", "exec", self.name, *words)

    def counters(self) -> dict[str, int]:
        with self.inside():
            return counters()

    def sysctl(self, name: str, value: str) -> bool:
        """False where this kernel does not have it for each namespace."""
        with self.inside():
            try:
                (Path("/proc/sys") / name.replace(".", "/")).write_text(value)
            except OSError:
                return False
        return True

    def states(self) -> list[str]:
        """The state of each TCP socket here."""
        with self.inside():
            tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        return [line.split()[3] for table in tables for line in table.splitlines()[1:]]

    @contextmanager
    def rule(self, *words: str, family: str = "both") -> Iterator[None]:
        """`rule("INPUT", "-p", "tcp", "-j", "DROP")`, while it lasts."""
        tools = {"ipv4": ["iptables"], "ipv6": ["ip6tables"], "both": ["iptables", "ip6tables"]}[family]
        chain, *match = words
        with ExitStack() as undo:
            for tool in tools:
                self.run(tool, "-w", "-A", chain, *match)
                undo.callback(self.run, tool, "-w", "-D", chain, *match)
            yield

    def loss(self, share: float) -> AbstractContextManager[None]:
        """This share of the TCP packets that arrive is lost."""
        return self.rule("INPUT", "-p", "tcp", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")


@contextmanager
def pair(lacks: Callable[[str], object]) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with a wire between them; both go again."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            lacks(f"{tool} is not installed; apt install {package}")
    tag = f"bpfm{os.getpid() % 100000}"
    ends = (
        Namespace(f"{tag}a", "10.213.7.1", "fd00:213:7::1", "veth0"),
        Namespace(f"{tag}b", "10.213.7.2", "fd00:213:7::2", "veth0"),
    )
    with ExitStack() as undo:
        for end in ends:
            _run("ip", "netns", "add", end.name)
            undo.callback(_run, "ip", "netns", "del", end.name)
        _run("ip", "link", "add", "veth0", "netns", ends[0].name, "type", "veth", "peer", "name", "veth0", "netns", ends[1].name)
        for end in ends:
            for words in (
                ("addr", "add", f"{end.ipv4}/24", "dev", end.device),
                ("addr", "add", f"{end.ipv6}/64", "dev", end.device, "nodad"),
                ("link", "set", "lo", "up"),
                ("link", "set", end.device, "up"),
            ):
                _run("ip", "-n", end.name, *words)
        yield ends


def wait_for(true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Polls; fails with `what` when the time is over."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)
