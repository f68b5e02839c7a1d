# SPDX-License-Identifier: Apache-2.0
"""Retransmissions against the kernel's own counters, with real losses between two network namespaces.

The truth is the sum over both namespaces and the host's own: RetransSegs for everything, TCPSynRetrans for handshakes,
TCPLossProbes for probes, TCPRetransFail for failures. Every comparison is exact.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from daemon.btf import Btf
from daemon.model import Exemplar
from tests.kernel import net
from tests.kernel.net import End

pytestmark = pytest.mark.kernel

RETRANSMITS, FAILURES = "bpf_tcp_retransmits", "bpf_tcp_retransmit_failures"
EVENTS = ("tcp/tcp_retransmit_skb", "tcp/tcp_retransmit_synack")
PORT = 21001  # below the range of automatic ports
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_KERNEL = ("RetransSegs", "TCPSynRetrans", "TCPLossProbes", "TCPRetransFail", "TCPSpuriousRtxHostQueues")

Wire = tuple[End, End]


@dataclass(frozen=True)
class Account:
    """What the kernel counted and what we did."""

    kernel: Counter[str]
    retransmits: Counter[tuple[str, ...]]
    failures: Counter[str]

    def since(self, before: Account) -> Account:
        found = replace(
            self, kernel=self.kernel.copy(), retransmits=self.retransmits.copy(), failures=self.failures.copy()
        )
        found.kernel.subtract(before.kernel)
        found.retransmits.subtract(before.retransmits)
        found.failures.subtract(before.failures)
        return found

    def kinds(self) -> Counter[str]:
        return self._by(2)

    def families(self) -> Counter[str]:
        return self._by(0)

    def _by(self, place: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for labels, value in self.retransmits.items():
            found[labels[place]] += value
        return +found

    def check(self) -> None:
        """What holds for any traffic."""
        kinds = self.kinds()
        assert self.retransmits.total() + self.failures.total() == self.kernel["RetransSegs"]
        assert self.failures.total() == self.kernel["TCPRetransFail"]
        assert kinds["probe"] <= self.kernel["TCPLossProbes"]


@dataclass(frozen=True)
class Lab:
    loaded: Any
    ends: Wire

    def account(self) -> Account:
        """One consistent moment: the kernel's counters stand still while ours are read."""
        while True:
            before, ours, after = self._kernel(), self.loaded.read(), self._kernel()
            if before == after:
                break
        retransmits = Counter({series.labels: int(series.value) for series in ours[RETRANSMITS].series})
        failures = Counter({series.labels[0]: int(series.value) for series in ours[FAILURES].series})
        return Account(after, retransmits, failures)

    def _kernel(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for values in (net.counters(), *(end.counters() for end in self.ends)):
            found.update(
                {name: sum(values.get(f"{group}.{name}", 0) for group in ("Tcp", "TcpExt")) for name in _KERNEL}
            )
        return found

    def measure(self, traffic: Callable[[], object]) -> Account:
        """What the traffic added, once all its sockets are done."""

        def once() -> Account:
            before = self.account()
            traffic()
            for end in self.ends:
                net.wait_for(end.quiet, f"the sockets of {end.name} to go")
            return self.account().since(before)

        found = net.undisturbed(EVENTS, once)
        found.check()
        return found

    def bulk(self, family: str, size: int, share: float) -> None:
        """Losses in the middle of transfers both ways; handshakes and ends are spared, for their timers are slow."""
        first, second = self.ends
        with ExitStack() as undo:
            ways = [net.connect(*way, family) for way in ((first, second), (second, first))]
            for each in (one for way in ways for one in way):
                undo.enter_context(each)
            with first.loss(share), second.loss(share):
                sending = [net.send(source, size) for source, _ in ways]
                for _, sink in ways:
                    net.receive(sink, size)
            for thread in sending:
                thread.join()

    def exemplar(self, labels: tuple[str, ...]) -> Exemplar | None:
        (found,) = [series.exemplar for series in self.loaded.read()[RETRANSMITS].series if series.labels == labels]
        return found


@pytest.fixture
def wire(lacks: Callable[[str], object]) -> Iterator[Wire]:
    with net.wire(lacks) as ends:
        for end in ends:
            end.sysctl("net.ipv4.tcp_retries2", "255")  # short timers soon reach the usual 15
            end.sysctl("net.ipv4.tcp_rto_min_us", "5000")  # kernels that lack these are slower here, and as exact
            end.sysctl("net.ipv4.tcp_rto_max_ms", "1000")
        yield ends


@pytest.fixture
def lab(load: Any, wire: Wire) -> Lab:
    return Lab(load("tcpretrans"), wire)


def both_tell_failures() -> bool:
    return (Btf().tracepoint_arguments("tcp_retransmit_skb") or 0) > 2


@pytest.mark.parametrize("forbid", ["", "tp_btf"])
@pytest.mark.parametrize(("share", "size"), [(0.1, 2 << 20), (0.5, 50_000)])
def test_every_segment_that_the_kernel_repeats(load: Any, wire: Wire, forbid: str, share: float, size: int) -> None:
    lab = Lab(load("tcpretrans", forbid=forbid), wire)

    def traffic() -> None:
        for family in ("ipv4", "ipv6"):
            lab.bulk(family, size, share)

    found = lab.measure(traffic)
    assert found.families().keys() == {"ipv4", "ipv6"}
    assert found.kernel["RetransSegs"] > 20
    assert {labels[1] for labels, value in found.retransmits.items() if value} <= {"established", "close_wait"}


def test_segments_that_wait_in_the_hosts_own_queue_are_not_repeated(lab: Lab, lacks: Callable[[str], object]) -> None:
    """Their attempts end with EBUSY, which from 6.18 on the tracepoint tells; RetransSegs does not know them."""
    first, second = lab.ends
    slow = (
        "tc",
        "qdisc",
        "add",
        "dev",
        first.device,
        "root",
        "tbf",
        "rate",
        "400kbit",
        "burst",
        "4kb",
        "latency",
        "9s",
    )
    try:
        first.run(*slow)
    except AssertionError as error:
        lacks(f"this kernel has no token bucket filter ({error})")

    def traffic() -> None:
        near, far = net.connect(first, second, "ipv4")
        with near, far:
            net.move(near, far, 20_000)

    found = lab.measure(traffic)
    assert found.kernel["TCPSpuriousRtxHostQueues"] > 0
    assert not found.failures.total()


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_lost_syns(lab: Lab, family: str) -> None:
    first, second = lab.ends
    two = 2 * (60 if family == "ipv4" else 80)  # a SYN with its options is so long
    lost = ("INPUT", "-p", "tcp", "--syn", "-m", "quota", "--quota", str(two), "-j", "DROP")

    def traffic() -> None:
        with second.rule(*lost, family=family):
            near, far = net.connect(first, second, family)
        near.close()
        far.close()

    found = lab.measure(traffic)
    assert found.retransmits[family, "syn_sent", "syn"] == found.kernel["TCPSynRetrans"] == 2
    assert found.kinds() == {"syn": 2}


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_lost_synacks(lab: Lab, family: str) -> None:
    """The client does not know that its SYN arrived, and repeats it too."""
    first, second = lab.ends
    two = 2 * (60 if family == "ipv4" else 80)
    lost = ("INPUT", "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-m", "quota", "--quota", str(two), "-j", "DROP")

    def traffic() -> None:
        with first.rule(*lost, family=family):
            near, far = net.connect(first, second, family)
        near.close()
        far.close()

    found = lab.measure(traffic)
    kinds = found.kinds()
    assert kinds["synack"] == found.retransmits[family, "new_syn_recv", "synack"] >= 2
    assert kinds["syn"] + kinds["synack"] == found.kernel["TCPSynRetrans"] == kinds.total()


def test_both_ends_connect_at_once(lab: Lab) -> None:
    """Crossing SYNs make a socket in SYN_RECV without a listener; its SYN-ACK is repeated like data."""
    first, second = lab.ends
    syn = ("INPUT", "-p", "tcp", "--syn", "-m", "quota", "--quota", "60", "-j", "DROP")
    synack = ("INPUT", "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-m", "quota", "--quota", "60", "-j", "DROP")

    def traffic() -> None:
        with ExitStack() as undo:
            for end in lab.ends:
                undo.enter_context(end.rule(*syn, family="ipv4"))
                undo.enter_context(end.rule(*synack, family="ipv4"))
            sockets = []
            for end, other in ((first, second), (second, first)):
                sockets.append(undo.enter_context(end.socket("ipv4", PORT)))
                sockets[-1].setblocking(False)
                sockets[-1].connect_ex((other.ipv4, PORT))
            for each, sink in zip(sockets, reversed(sockets), strict=True):
                sink.settimeout(20)
                net.wait_for(lambda each=each: sent(each), "the connection")
                net.receive(sink, 1)
            for each in sockets:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def sent(each: socket.socket) -> bool:
        try:
            return each.send(b"x") == 1
        except (BlockingIOError, BrokenPipeError, ConnectionError):
            return False

    found = lab.measure(traffic)
    kinds = found.kinds()
    assert kinds["synack"] == found.retransmits["ipv4", "syn_recv", "synack"] >= 1
    assert kinds["syn"] >= 1
    assert kinds["syn"] + kinds["synack"] == found.kernel["TCPSynRetrans"]


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_loss_probes_that_repeat_data(lab: Lab, family: str) -> None:
    """The last three packets are lost: a probe repeats the third, its acknowledgement tells of the other two."""
    first, second = lab.ends
    connections, size = 8, 1000
    packet = size + (52 if family == "ipv4" else 72)
    tail = ("INPUT", "-p", "tcp", "-m", "length", "--length", f"{packet}:{3 * packet}", "-m", "quota")

    def traffic() -> None:
        with ExitStack() as undo:
            for _ in range(connections):
                near, far = net.connect(first, second, family)
                undo.enter_context(near)
                undo.enter_context(far)
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                net.move(near, far, 100)  # so that both know the round-trip time
                with second.rule(*tail, "--quota", str(3 * packet), "-j", "DROP", family=family):
                    for _ in range(3):
                        near.send(bytes(size))
                    net.receive(far, 3 * size)

    found = lab.measure(traffic)
    assert found.kinds() == {"probe": connections, "data": 2 * connections}
    assert found.kernel["TCPLossProbes"] == connections
    assert found.retransmits[family, "established", "probe"] == connections


def test_loss_probes_that_send_new_data_are_no_retransmissions(lab: Lab) -> None:
    """What the congestion window holds is lost, more waits: the probe sends some of it. TCPLossProbes counts that."""
    first, second = lab.ends
    # The slow timer of retransmissions leaves the probe alone on the scene.
    first.ip("route", "change", "10.213.7.0/24", "dev", first.device, "src", first.ipv4, "rto_min", "20s")

    def traffic() -> None:
        near, far = net.connect(first, second, "ipv4")
        with near, far:
            net.move(near, far, 100)
            probes = first.counters()["TcpExt.TCPLossProbes"]
            with second.rule("INPUT", "-p", "tcp", "-j", "DROP", family="ipv4"):
                near.setblocking(False)
                assert near.send(bytes(200_000)) > 50_000
                net.wait_for(lambda: first.counters()["TcpExt.TCPLossProbes"] > probes, "the probe")
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                near.close()

    def once() -> Account:
        return lab.measure(traffic)

    found = once()
    assert found.kernel["TCPLossProbes"] == 1
    assert not found.retransmits.total()


def test_sends_that_fail(lab: Lab, lacks: Callable[[str], object]) -> None:
    """RetransSegs counts them, and TCPRetransFail does."""
    if not both_tell_failures():
        lacks("this kernel does not tell failed retransmissions (from 6.18 on)")
    first, second = lab.ends

    def traffic() -> None:
        for family in ("ipv4", "ipv6"):
            near, far = net.connect(first, second, family)
            with near, far:
                net.move(near, far, 100)
                failed = first.counters()["TcpExt.TCPRetransFail"]
                with second.rule("INPUT", "-p", "tcp", "-j", "DROP", family=family):
                    sending = net.send(near, 100_000)
                    with first.rule("OUTPUT", "-p", "tcp", "-j", "DROP", family=family):
                        net.wait_for(lambda failed=failed: first.counters()["TcpExt.TCPRetransFail"] > failed + 2, "no")
                net.receive(far, 100_000)
                sending.join()

    found = lab.measure(traffic)
    assert found.failures["ipv4"] > 2
    assert found.failures["ipv6"] > 2


def test_attempts_without_a_route_are_no_retransmissions(lab: Lab) -> None:
    """They end before anything is counted, with EHOSTUNREACH."""
    first, second = lab.ends

    def traffic() -> None:
        near, far = net.connect(first, second, "ipv4")
        with near, far:
            net.move(near, far, 100)
            timeouts = first.counters()["TcpExt.TCPTimeouts"]
            with second.rule("INPUT", "-p", "tcp", "-j", "DROP", family="ipv4"):
                near.send(bytes(1000))
                first.ip("link", "set", first.device, "down")
                net.wait_for(lambda: first.counters()["TcpExt.TCPTimeouts"] > timeouts + 2, "the timer")
                first.ip("link", "set", first.device, "up")
            net.receive(far, 1000)

    found = lab.measure(traffic)
    assert not found.failures.total()


def test_by_remote_subnet(load: Any, wire: Wire) -> None:
    lab = Lab(load("tcpretrans", by="remote_subnet"), wire)

    def traffic() -> None:
        lab.bulk("ipv4", 1 << 20, 0.1)
        lab.bulk("ipv6", 1 << 20, 0.1)

    before = [end.counters()["Tcp.RetransSegs"] for end in wire]
    found = lab.measure(traffic)
    after = [end.counters()["Tcp.RetransSegs"] for end in wire]
    own = {labels: value for labels, value in found.retransmits.items() if labels[3].startswith(("10.213", "fd00:213"))}
    assert {(labels[0], labels[3]) for labels in own} == {("ipv4", "10.213.7.0/24"), ("ipv6", "fd00:213:7::/64")}
    assert sum(own.values()) <= sum(after) - sum(before)  # more where the measurement was made again
    assert sum(own.values()) > 20


def test_by_local_port_with_exemplars(load: Any, wire: Wire) -> None:
    """Only the server sends, and its first two SYN-ACKs are lost."""
    lab, (client, server) = Lab(load("tcpretrans", by="local_port"), wire), wire
    port = str(PORT)
    for family in ("ipv4", "ipv6"):
        length = str(2 * (60 if family == "ipv4" else 80))
        lost = (
            "INPUT",
            "-p",
            "tcp",
            "--tcp-flags",
            "SYN,ACK",
            "SYN,ACK",
            "-m",
            "quota",
            "--quota",
            length,
            "-j",
            "DROP",
        )
        names: list[dict[str, str]] = []

        def traffic(family: str = family, lost: tuple[str, ...] = lost, names: list[dict[str, str]] = names) -> None:
            with server.listen(family, PORT) as listener, client.socket(family) as near:
                with client.rule(*lost, family=family):
                    near.connect(listener.getsockname()[:2])
                far, _ = listener.accept()
                names.append({
                    "laddr": server.address(family), "lport": port,
                    "raddr": client.address(family), "rport": str(near.getsockname()[1]),
                })  # fmt: skip
                with far, client.loss(0.1):
                    net.move(far, near, 1 << 20)

        found = lab.measure(traffic)
        assert found.retransmits[family, "established", "data", port] > 0
        assert found.retransmits[family, "new_syn_recv", "synack", port] >= 2
        for labels in ((family, "established", "data", port), (family, "new_syn_recv", "synack", port)):
            exemplar = lab.exemplar(labels)
            assert exemplar is not None
            assert exemplar.value >= 1
            told = dict(exemplar.labels)
            told.pop("cgroup", None)
            assert told == names[0]


def test_ipv4_through_an_ipv6_socket_is_ipv4(lab: Lab) -> None:
    first, second = lab.ends
    lost = ("INPUT", "-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK", "-m", "quota", "--quota", "60", "-j", "DROP")

    def traffic() -> None:
        with second.listen("ipv6", PORT, "::") as listener, first.socket("ipv6") as near:
            with first.rule(*lost, family="ipv4"):
                near.connect((f"::ffff:{second.ipv4}", PORT))
            far, _ = listener.accept()
            with far, first.loss(0.1), second.loss(0.1):
                net.move(near, far, 1 << 20)
                net.move(far, near, 1 << 20)

    found = lab.measure(traffic)
    assert found.retransmits["ipv4", "established", "data"] > 0
    assert found.retransmits["ipv4", "new_syn_recv", "synack"] >= 1
    assert found.families().keys() == {"ipv4"}


def test_one_event_for_each_retransmission(load: Any, wire: Wire) -> None:
    lab, (first, second) = Lab(load("tcpretrans", events="true"), wire), wire
    names: set[tuple[Any, ...]] = set()

    def traffic() -> None:
        lab.loaded.engine.drain()
        lab.loaded.events.clear()
        names.clear()
        for family in ("ipv4", "ipv6"):
            near, far = net.connect(first, second, family)
            ends = [(each.getsockname()[0], str(each.getsockname()[1])) for each in (near, far)]
            names.update({(*ends[0], *ends[1]), (*ends[1], *ends[0])})
            with near, far, second.loss(0.1):
                net.move(near, far, 1 << 20)

    found = lab.measure(traffic)
    lab.loaded.engine.drain()
    told: Counter[tuple[str, ...]] = Counter()
    for event in lab.loaded.events:
        field = event.fields
        if (field["laddr"], field["lport"], field["raddr"], field["rport"]) in names:
            family = "ipv6" if ":" in field["laddr"] else "ipv4"
            told[family, field["state"], field["kind"]] += field["segments"]
            assert event.message.startswith(f"TCP retransmit ({field['kind']}) {field['laddr']}:{field['lport']} -> ")
    assert told["ipv4", "established", "data"] > 0
    assert told["ipv6", "established", "data"] > 0
    assert told == +found.retransmits


@pytest.mark.parametrize(("by", "more"), [("none", ()), ("remote_subnet", ("other",)), ("local_port", ("other",))])
def test_what_can_happen_is_there_at_zero(load: Any, by: str, more: tuple[str, ...]) -> None:
    loaded = load("tcpretrans", by=by)
    open_states = ("established", "close_wait", "fin_wait1", "closing", "last_ack")
    wanted = {(state, "data") for state in (*open_states, "fin_wait2")} | {(state, "probe") for state in open_states}
    wanted |= {("syn_sent", "syn"), ("syn_recv", "synack"), ("new_syn_recv", "synack")}
    assert loaded.series(RETRANSMITS).keys() >= {
        (family, *pair, *more) for pair in wanted for family in ("ipv4", "ipv6")
    }
    assert loaded.series(FAILURES).keys() == {("ipv4",), ("ipv6",)}
