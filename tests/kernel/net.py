# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces joined by a veth pair, losses between them, and the kernel's own TCP counters.

A socket belongs to the namespace that its thread was in when it was made, so the tests need no processes of their own.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "ip6tables": "iptables"}
_INSTANCES = Path("/sys/kernel/tracing/instances")
_ATTEMPTS = 8
_TIMEOUT_S = 60
_SUBNETS = itertools.count(os.getpid() * 64)  # what the sockets of earlier ones still send has other addresses
_libc = ctypes.CDLL(None, use_errno=True)

LISTEN, TIME_WAIT = "0A", "06"  # as /proc/net/tcp writes them
SOCKET_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
T = TypeVar("T")


def counters() -> dict[str, int]:
    """`Tcp.RetransSegs`, `TcpExt.TCPSynRetrans` and their like, of the namespace that this thread is in."""
    found = {}
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            prefix, *keys = names.split()
            for key, value in zip(keys, values.split()[1:], strict=True):
                found[f"{prefix[:-1]}.{key}"] = int(value)
    return found


@contextmanager
def _entered(namespace: Path) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        inside = os.open(namespace, os.O_RDONLY)
        try:
            _setns(inside)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(inside)
    finally:
        os.close(before)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@dataclass(frozen=True)
class End:
    """One end of the wire: a namespace, its addresses and device, and what is done inside it."""

    name: str
    ipv4: str
    ipv6: str
    device: str = "veth0"

    def inside(self) -> AbstractContextManager[None]:
        """Sockets that are made under it belong to this namespace."""
        return _entered(Path("/run/netns", self.name))

    def run(self, *words: str) -> None:
        _run("ip", "netns", "exec", self.name, *words)

    def ip(self, *words: str) -> None:
        _run("ip", "-n", self.name, *words)

    def address(self, family: str) -> str:
        return self.ipv4 if family == "ipv4" else self.ipv6

    def subnet(self, family: str) -> str:
        bits = 24 if family == "ipv4" else 64
        return str(ip_interface(f"{self.address(family)}/{bits}").network)

    def single_packets(self) -> None:
        """No packet carries several segments."""
        self.ip("link", "set", self.device, "gso_max_segs", "1")

    def retransmit_after(self, time: str) -> None:
        """The shortest timer of retransmissions, to addresses of the wire (every kernel has it for routes)."""
        for family, more in {"ipv4": ("scope", "link", "src", self.ipv4), "ipv6": ("metric", "256")}.items():
            route = (self.subnet(family), "dev", self.device, "proto", "kernel", *more)
            self.ip("route", "replace", *route, "rto_min", time)

    def counters(self) -> dict[str, int]:
        with self.inside():
            return counters()

    def sysctl(self, name: str, value: str) -> bool:
        """False where this kernel does not have it for each namespace."""
        with self.inside():
            try:
                Path("/proc/sys", name.replace(".", "/")).write_text(value)
            except OSError:
                return False
        return True

    def quiet(self) -> bool:
        """No TCP socket is left that could still send something of its own."""
        with self.inside():
            tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        states = {line.split()[3] for table in tables for line in table.splitlines()[1:]}
        return states <= {LISTEN, TIME_WAIT}

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

    def random_loss(self, share: float, *match: str) -> AbstractContextManager[None]:
        """This share of the TCP packets that arrive is lost. (By turns, a sender that repeats two at a time would lose
        the first of them for ever.)
        """
        random = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        return self.rule("INPUT", "-p", "tcp", *match, *random, "-j", "DROP")

    def data_loss(self, share: float) -> AbstractContextManager[None]:
        """The same of those that carry data."""
        return self.random_loss(share, "-m", "length", "--length", "100:65535")

    def listen(self, family: str, port: int = 0, address: str = "") -> socket.socket:
        with self.inside():
            found = socket.socket(SOCKET_FAMILIES[family])
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address == "::":
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.bind((address or self.address(family), port))
        found.listen(512)
        return found

    def socket(self, family: str, port: int = 0) -> socket.socket:
        """A socket to connect, from this local port."""
        with self.inside():
            found = socket.socket(SOCKET_FAMILIES[family])
        if port:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((self.address(family), port))
        return found


@contextmanager
def wire(lacks: Callable[[str], object]) -> Iterator[tuple[End, End]]:
    """Two namespaces with a wire between them, in subnets that were never used before; both go again."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            lacks(f"{tool} is not installed; apt install {package}")
    tag = f"bpfmetricsd_{os.getpid()}"
    high, low = divmod(next(_SUBNETS) & 0xFFFF, 256)
    ends = first, second = (
        End(f"{tag}_a", f"10.{high}.{low}.1", str(ip_address(f"fd00:{high:x}:{low:x}::1"))),
        End(f"{tag}_b", f"10.{high}.{low}.2", str(ip_address(f"fd00:{high:x}:{low:x}::2"))),
    )
    with ExitStack() as undo:
        for end in ends:
            _run("ip", "netns", "add", end.name)
            undo.callback(_run, "ip", "netns", "del", end.name)
        peer = ("peer", "name", second.device, "netns", second.name)
        _run("ip", "link", "add", first.device, "netns", first.name, "type", "veth", *peer)
        for end in ends:
            end.ip("addr", "add", f"{end.ipv4}/24", "dev", end.device)
            end.ip("addr", "add", f"{end.ipv6}/64", "dev", end.device, "nodad")
            end.ip("link", "set", "lo", "up")
            end.ip("link", "set", end.device, "up")
        yield ends


def connect(client: End, server: End, family: str, port: int = 0) -> tuple[socket.socket, socket.socket]:
    """An established connection: the client's socket and the server's. `port` is the client's own."""
    with server.listen(family) as listener:
        near = client.socket(family, port)
        near.connect(listener.getsockname()[:2])
        far, _ = listener.accept()
    return near, far


def at_once(action: Callable[[str], object]) -> None:
    """For both families at the same time: most of it is waiting."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(action, SOCKET_FAMILIES))


def send(source: socket.socket, size: int) -> threading.Thread:
    """Sends in the background."""
    thread = threading.Thread(target=source.sendall, args=(bytes(size),), daemon=True)
    thread.start()
    return thread


def receive(sink: socket.socket, size: int) -> None:
    """Waits for exactly so many bytes."""
    sink.settimeout(_TIMEOUT_S)
    while size:
        part = len(sink.recv(min(size, 1 << 20)))
        assert part, f"the connection ended {size} bytes early"
        size -= part


def move(source: socket.socket, sink: socket.socket, size: int) -> None:
    sending = send(source, size)
    receive(sink, size)
    sending.join()


def wait_for(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Polls; fails with `what` when the time is over."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.005)


@contextmanager
def _traced(events: tuple[str, ...]) -> Iterator[Callable[[], list[str]]]:
    """What tracefs tells of these tracepoints, a line for each time that one fired (nothing without tracefs)."""
    instance = _INSTANCES / f"bpfmetricsd_{os.getpid()}"
    try:
        instance.mkdir()
    except OSError:
        yield list
        return
    try:
        (instance / "buffer_size_kb").write_text("4096")
        for event in events:
            (instance / "events" / event / "enable").write_text("1")
        yield lambda: _whole((instance / "trace").read_text())
    finally:
        for event in events:
            (instance / "events" / event / "enable").write_text("0")
        instance.rmdir()


def _whole(trace: str) -> list[str]:
    kept, written = re.findall(r"entries-in-buffer/entries-written: (\d+)/(\d+)", trace)[0]
    assert kept == written, "tracefs has no room for all events"
    return [line for line in trace.splitlines() if line and not line.startswith("#")]


def on_process_1(line: str) -> bool:
    """An event in an interrupt that caught a thread of process 1."""
    task = re.search(r"-(\d+) +\[\d+\]", line)
    return task is not None and Path("/proc/1/task", task[1]).exists()


def addresses(line: str) -> set[str]:
    """Of an event of a TCP socket, in the form that Python writes them in; IPv4 also where it comes through IPv6."""
    found = (ip_address(word) for word in re.findall(r"[sd]addr(?:v6)?=([\w.:]+)", line))
    return {str((one.version == 6 and one.ipv4_mapped) or one) for one in found}


def undisturbed(events: tuple[str, ...], disturbs: Callable[[str], bool], measure: Callable[[], T]) -> T:
    """What `measure` gives when no event came between that `disturbs` tells of, by its line in tracefs.

    Nor one on top of process 1: sandboxes whose process 1 is their own keep BPF programs from running there, so an
    event in an interrupt that catches one of its threads goes uncounted.
    """
    for _ in range(_ATTEMPTS):
        with _traced(events) as lines:
            result = measure()
            if not any(on_process_1(line) or disturbs(line) for line in lines()):
                return result
    raise AssertionError(f"something was in the way {_ATTEMPTS} times in a row")
