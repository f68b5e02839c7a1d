# SPDX-License-Identifier: Apache-2.0
"""Retransmissions against the kernel's own counters, with real losses between two network namespaces.

RetransSegs is the truth for everything, TCPSynRetrans for handshakes, TCPLossProbes for probes, TCPRetransFail for
failures. Every comparison is exact. The metrics cover the whole machine, so most tests look at the two subnets that are
theirs alone; where all is compared, tracefs must not have seen an event of anybody else meanwhile. A namespace without
a name may still live for the sake of dying sockets, and what these send again is in no counter that can be read.
"""

from __future__ import annotations

import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from collectors import tcpretrans
from daemon import loader
from daemon.btf import Btf
from tests.accuracy import compared
from tests.kernel import net
from tests.kernel.net import End

pytestmark = pytest.mark.kernel

RETRANSMITS, FAILURES = "bpf_tcp_retransmits", "bpf_tcp_retransmit_failures"
EVENTS = ("tcp/tcp_retransmit_skb", "tcp/tcp_retransmit_synack")
PORT = 21001  # below the range of automatic ports
FAMILIES = ("ipv4", "ipv6")
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
SYNACK = ("-p", "tcp", "--tcp-flags", "SYN,ACK", "SYN,ACK")
_KERNEL = (
    "Tcp.RetransSegs", "TcpExt.TCPSynRetrans", "TcpExt.TCPLossProbes", "TcpExt.TCPRetransFail",
    "TcpExt.TCPSpuriousRtxHostQueues", "TcpExt.TCPFastRetrans", "TcpExt.TCPSlowStartRetrans",
)  # fmt: skip

Wire = tuple[End, End]


def first(count: int, size: int, *match: str) -> tuple[str, ...]:
    """A rule that drops the first packets (of this size, or somewhat shorter) that match."""
    return ("INPUT", *match, "-m", "quota", "--quota", str(count * size), "-j", "DROP")


def handshake_size(family: str) -> int:
    """A SYN or SYN-ACK with its options, in bytes."""
    return 60 if family == "ipv4" else 80


def tells_failures() -> bool:
    """From 6.17 on ("tcp: trace retransmit failures in tcp_retransmit_skb")."""
    return (Btf().tracepoint_arguments("tcp_retransmit_skb") or 0) > 2


@dataclass(frozen=True)
class Account:
    """What the kernel counted in both namespaces, and what we did."""

    kernel: Counter[str]
    retransmits: Counter[tuple[str, ...]]
    failures: Counter[str]

    def since(self, before: Account) -> Account:
        return Account(
            Counter({key: value - before.kernel[key] for key, value in self.kernel.items()}),
            Counter({key: value - before.retransmits[key] for key, value in self.retransmits.items()}),
            Counter({key: value - before.failures[key] for key, value in self.failures.items()}),
        )

    def by(self, place: int) -> Counter[str]:
        """Of (family, state, kind)."""
        found: Counter[str] = Counter()
        for labels, value in self.retransmits.items():
            found[labels[place]] += value
        return +found

    def check(self) -> None:
        """What holds for any traffic."""
        kinds, kernel = self.by(2), self.kernel
        assert self.retransmits.total() + kernel["TCPRetransFail"] == kernel["RetransSegs"]
        assert self.failures.total() == (kernel["TCPRetransFail"] if tells_failures() else 0)
        assert kinds["probe"] <= kernel["TCPLossProbes"]
        assert kinds["data"] >= kernel["TCPFastRetrans"] + kernel["TCPSlowStartRetrans"]  # and those of timers
        if not kernel["TCPRetransFail"]:
            assert kinds["syn"] + kinds["synack"] == kernel["TCPSynRetrans"]


@dataclass(frozen=True)
class Lab:
    """`own`: only the two ends are looked at, which needs `by: remote_subnet`."""

    loaded: Any
    ends: Wire
    own: bool = True

    def account(self) -> Account:
        """One consistent moment: the kernel's counters stand still while ours are read."""
        while True:
            before, ours, after = self._kernel(), self.loaded.read(), self._kernel()
            if before == after:
                break
        subnets = [self.ends[0].subnet(family) for family in FAMILIES]
        retransmits: Counter[tuple[str, ...]] = Counter()
        for series in ours[RETRANSMITS].series:
            if not self.own or series.labels[3] in subnets:
                retransmits[series.labels[:3]] += series.value
        return Account(
            after, retransmits, Counter({series.labels[0]: series.value for series in ours[FAILURES].series})
        )

    def _kernel(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for end in self.ends:
            found.update({key.partition(".")[2]: value for key, value in end.counters().items() if key in _KERNEL})
        return found

    def _disturbs(self, line: str) -> bool:
        """Another's event that this lab cannot tell from its own. Failures have no subnet."""
        known = {end.address(family) for end in self.ends for family in FAMILIES}
        failed = re.search(r" err=-?[1-9]", line)
        return net.addresses(line).isdisjoint(known) and (not self.own or failed is not None)

    def measure(self, traffic: Callable[[], object]) -> Account:
        """What the traffic added, once all its sockets are done."""

        def once() -> Account:
            before = self.account()
            traffic()
            for end in self.ends:
                net.wait_for(end.quiet, f"the sockets of {end.name} to go")
            return self.account().since(before)

        found = net.undisturbed(EVENTS, self._disturbs, once)
        segments = found.retransmits.total() + found.kernel["TCPRetransFail"]
        compared(self.loaded, "segments", segments, found.kernel["RetransSegs"])
        found.check()
        return found

    def bulk(self, family: str, size: int, loss: Callable[[End], AbstractContextManager[None]]) -> None:
        """Losses in the middle of transfers both ways; handshakes and ends are spared, for their timers are slow."""
        near, far = self.ends
        with ExitStack() as undo:
            ways = [net.connect(*way, family) for way in ((near, far), (far, near))]
            for each in (one for way in ways for one in way):
                undo.enter_context(each)
            with loss(near), loss(far):
                sending = [net.send(source, size) for source, _ in ways]
                for _, sink in ways:
                    net.receive(sink, size)
            for thread in sending:
                thread.join()


@pytest.fixture
def wire(lacks: Callable[[str], object]) -> Iterator[Wire]:
    with net.wire(lacks) as ends:
        for end in ends:
            end.sysctl("net.ipv4.tcp_retries2", "255")  # short timers soon reach the usual 15
            end.sysctl("net.ipv4.tcp_rto_max_ms", "1000")  # kernels that lack it are slower here, and as exact
            end.retransmit_after("5ms")
        yield ends


@pytest.fixture
def lab(shared: Any, wire: Wire) -> Lab:
    return Lab(shared("tcpretrans", by="remote_subnet"), wire)


@pytest.mark.parametrize(("by", "forbid"), [("none", ""), ("none", "tp_btf"), ("local_port", "")])
def test_a_tenth_of_all_packets_is_lost(shared: Any, wire: Wire, by: str, forbid: str) -> None:
    """A packet may hold many segments."""
    lab = Lab(shared("tcpretrans", forbid=forbid, by=by), wire, own=False)

    def traffic() -> None:
        for family in FAMILIES:
            lab.bulk(family, 2 << 20, lambda end: end.random_loss(0.1))

    found = lab.measure(traffic)
    assert found.by(0).keys() == set(FAMILIES)
    assert found.by(1)["established"] > 20


@pytest.mark.parametrize(("share", "size"), [(0.01, 2 << 20), (0.5, 30_000)], ids=["1%", "50%"])
def test_a_share_of_all_data_is_lost(shared: Any, wire: Wire, share: float, size: int) -> None:
    lab = Lab(shared("tcpretrans", by="none"), wire, own=False)
    for end in wire:
        end.single_packets()

    def traffic() -> None:
        for family in FAMILIES:
            lab.bulk(family, size, lambda end: end.data_loss(share))

    found = lab.measure(traffic)
    assert found.by(0).keys() == set(FAMILIES)
    assert found.by(1)["established"] > 20


def test_segments_that_wait_in_the_hosts_own_queue_are_not_repeated(lab: Lab, lacks: Callable[[str], object]) -> None:
    """Their attempts end with EBUSY, which from 6.18 on the tracepoint tells; RetransSegs does not know them."""
    near, far = lab.ends
    slow = ("tbf", "rate", "200kbit", "burst", "4kb", "latency", "9s")
    try:
        near.run("tc", "qdisc", "add", "dev", near.device, "root", *slow)
    except AssertionError as error:
        lacks(f"this kernel has no token bucket filter ({error})")
    near.single_packets()  # what the filter itself cuts into packets no longer waits for TCP to see

    def traffic() -> None:
        source, sink = net.connect(near, far, "ipv4")
        with source, sink:
            net.move(source, sink, 20_000)

    found = lab.measure(traffic)
    assert found.kernel["TCPSpuriousRtxHostQueues"] > 0
    assert not found.failures.total()


def test_lost_syns(lab: Lab) -> None:
    near, far = lab.ends

    def traffic(family: str) -> None:
        with far.rule(*first(2, handshake_size(family), "-p", "tcp", "--syn"), family=family):
            for each in net.connect(near, far, family):
                each.close()

    found = lab.measure(lambda: net.at_once(traffic))
    assert +found.retransmits == {(family, "syn_sent", "syn"): 2 for family in FAMILIES}


def test_lost_synacks(lab: Lab) -> None:
    """The client does not know that its SYN arrived, and repeats it too."""
    near, far = lab.ends

    def traffic(family: str) -> None:
        with near.rule(*first(2, handshake_size(family), *SYNACK), family=family):
            for each in net.connect(near, far, family):
                each.close()

    found = +lab.measure(lambda: net.at_once(traffic)).retransmits
    for family in FAMILIES:
        assert found.pop((family, "new_syn_recv", "synack")) >= 2
    assert found.keys() <= {(family, "syn_sent", "syn") for family in FAMILIES}


FAST_OPEN = 0x1 | 0x2 | 0x4 | 0x200 | 0x400  # as client and server, without a cookie, for all that listen


def test_fast_open(lab: Lab, lacks: Callable[[str], object]) -> None:
    """A SYN with data is lost: both are repeated. Then a SYN-ACK, while the server's socket is in use already."""
    near, far = lab.ends
    if not all(end.sysctl("net.ipv4.tcp_fastopen", str(FAST_OPEN)) for end in lab.ends):
        lacks("this kernel has no TCP Fast Open")

    def connected(family: str, listener: socket.socket, end: End, size: int, *match: str) -> None:
        with end.rule(*first(1, size, *match), family=family), near.socket(family) as source:
            assert source.sendto(bytes(100), socket.MSG_FASTOPEN, listener.getsockname()[:2]) == 100
            sink, _ = listener.accept()
            with sink:
                net.receive(sink, 100)
                net.move(sink, source, 1)

    def traffic(family: str) -> None:
        with far.listen(family) as listener:
            connected(family, listener, far, handshake_size(family) + 112, "-p", "tcp", "--syn")
            connected(family, listener, near, handshake_size(family), *SYNACK)

    found = +lab.measure(lambda: net.at_once(traffic)).retransmits
    for family in FAMILIES:
        assert found.pop((family, "syn_sent", "syn")) >= 1
        assert found.pop((family, "new_syn_recv", "synack")) >= 1
        assert found.pop((family, "established", "data")) == 1  # what came with the lost SYN
    assert not found


def test_syn_cookies(lab: Lab, lacks: Callable[[str], object]) -> None:
    """The server does not remember that a SYN was there: only the client repeats."""
    near, far = lab.ends
    if not far.sysctl("net.ipv4.tcp_syncookies", "2"):
        lacks("this kernel has no SYN cookies")

    def traffic(family: str) -> None:
        with near.rule(*first(1, handshake_size(family), *SYNACK), family=family):
            for each in net.connect(near, far, family):
                each.close()

    found = lab.measure(lambda: net.at_once(traffic))
    assert +found.retransmits == {(family, "syn_sent", "syn"): 1 for family in FAMILIES}


def test_both_ends_connect_at_once(lab: Lab) -> None:
    """Crossing SYNs make a socket in SYN_RECV without a listener; its SYN-ACK is repeated as data is."""

    def connected(each: socket.socket) -> bool:
        try:
            return each.send(b"x") == 1
        except (BlockingIOError, BrokenPipeError):
            return False

    def traffic() -> None:
        with ExitStack() as undo:
            for end in lab.ends:
                undo.enter_context(end.rule(*first(1, 60, "-p", "tcp", "--syn"), family="ipv4"))
                undo.enter_context(end.rule(*first(1, 60, *SYNACK), family="ipv4"))
            sockets = [undo.enter_context(end.socket("ipv4", PORT)) for end in lab.ends]
            for each, other in zip(sockets, reversed(lab.ends), strict=True):
                each.setblocking(False)
                each.connect_ex((other.ipv4, PORT))
            for each, other in zip(sockets, reversed(sockets), strict=True):
                net.wait_for(lambda each=each: connected(each), "the connection")  # type: ignore[misc]
                net.receive(other, 1)
            for each in sockets:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    found = +lab.measure(traffic).retransmits
    assert found.keys() == {("ipv4", "syn_sent", "syn"), ("ipv4", "syn_recv", "synack")}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_probes_that_repeat_data(lab: Lab, family: str) -> None:
    """The last three packets are lost: a probe repeats the third, its acknowledgement tells of the other two."""
    near, far = lab.ends
    connections, size = 8, 1000
    packet = size + (52 if family == "ipv4" else 72)
    for end in lab.ends:
        end.single_packets()

    def traffic() -> None:
        with ExitStack() as undo:
            for _ in range(connections):
                source, sink = net.connect(near, far, family)
                undo.enter_context(source)
                undo.enter_context(sink)
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                net.move(source, sink, 100)  # so that the round-trip time is known
                with far.rule(*first(3, packet, "-p", "tcp", "-m", "length", "--length", f"{packet}"), family=family):
                    for _ in range(3):
                        source.send(bytes(size))
                    net.receive(sink, 3 * size)

    found = lab.measure(traffic)
    assert +found.retransmits == {
        (family, "established", "probe"): connections,
        (family, "established", "data"): 2 * connections,
    }
    assert found.kernel["TCPLossProbes"] == connections


def test_loss_probes_that_send_new_data_are_no_retransmissions(lab: Lab) -> None:
    """What the congestion window holds is lost, more waits: the probe sends some of it. TCPLossProbes counts that."""
    near, far = lab.ends
    near.retransmit_after("20s")  # so that the probe is alone

    def traffic() -> None:
        source, sink = net.connect(near, far, "ipv4")
        with source, sink:
            net.move(source, sink, 100)
            probes = near.counters()["TcpExt.TCPLossProbes"]
            with far.rule("INPUT", "-p", "tcp", "-j", "DROP", family="ipv4"):
                source.setblocking(False)
                assert source.send(bytes(200_000)) > 50_000
                net.wait_for(lambda: near.counters()["TcpExt.TCPLossProbes"] > probes, "the probe")
                source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                source.close()

    found = lab.measure(traffic)
    assert found.kernel["TCPLossProbes"] == 1
    assert not found.retransmits.total()


def test_sends_that_fail(lab: Lab, lacks: Callable[[str], object]) -> None:
    """RetransSegs counts them, and TCPRetransFail does."""
    if not tells_failures():
        lacks("this kernel does not tell failed retransmissions (from 6.18 on)")
    near, far = lab.ends

    def traffic() -> None:
        for family in FAMILIES:
            source, sink = net.connect(near, far, family)
            with source, sink:
                net.move(source, sink, 100)
                enough = near.counters()["TcpExt.TCPRetransFail"] + 1
                with far.rule("INPUT", "-p", "tcp", "-j", "DROP", family=family):
                    sending = net.send(source, 100_000)
                    with near.rule("OUTPUT", "-p", "tcp", "-j", "DROP", family=family):
                        net.wait_for(lambda n=enough: near.counters()["TcpExt.TCPRetransFail"] >= n, "the firewall")  # type: ignore[misc]
                net.receive(sink, 100_000)
                sending.join()

    found = lab.measure(traffic)
    assert all(found.failures[family] >= 1 for family in FAMILIES)


def test_sends_that_fail_for_want_of_a_route_further_down(lab: Lab) -> None:
    """They are counted before the firewall's mark takes their route, unlike those that TCP finds no route for."""
    near, far = lab.ends
    for version in ("-4", "-6"):
        near.ip(version, "rule", "add", "fwmark", "1", "lookup", "100")
        near.ip(version, "route", "add", "unreachable", "default", "metric", "1", "table", "100")
    mark = ("OUTPUT", "-t", "mangle", "-p", "tcp", "-j", "MARK", "--set-mark", "1")

    def traffic() -> None:
        for family in FAMILIES:
            source, sink = net.connect(near, far, family)
            with source, sink:
                net.move(source, sink, 100)
                enough = near.counters()["TcpExt.TCPRetransFail"] + 1
                with far.rule("INPUT", "-p", "tcp", "-j", "DROP", family=family):
                    source.send(bytes(1000))
                    with near.rule(*mark, family=family):
                        net.wait_for(lambda n=enough: near.counters()["TcpExt.TCPRetransFail"] >= n, "the firewall")  # type: ignore[misc]
                net.receive(sink, 1000)

    found = lab.measure(traffic)
    if tells_failures():
        assert all(found.failures[family] >= 1 for family in FAMILIES)


def test_attempts_without_a_route_are_no_retransmissions(lab: Lab) -> None:
    """They end before anything is counted, with EHOSTUNREACH."""
    near, far = lab.ends

    def traffic() -> None:
        source, sink = net.connect(near, far, "ipv4")
        with source, sink:
            net.move(source, sink, 100)
            enough = near.counters()["TcpExt.TCPTimeouts"] + 3
            with far.rule("INPUT", "-p", "tcp", "-j", "DROP", family="ipv4"):
                source.send(bytes(1000))
                near.ip("link", "set", near.device, "down")
                net.wait_for(lambda: near.counters()["TcpExt.TCPTimeouts"] >= enough, "the timer")
                near.ip("link", "set", near.device, "up")
            net.receive(sink, 1000)

    assert not lab.measure(traffic).failures.total()


def test_ipv4_through_an_ipv6_socket_is_ipv4(lab: Lab) -> None:
    near, far = lab.ends
    for end in lab.ends:
        end.single_packets()

    def traffic() -> None:
        with far.listen("ipv6", PORT, "::") as listener, near.socket("ipv6") as source:
            with near.rule(*first(1, 60, *SYNACK), family="ipv4"):
                source.connect((f"::ffff:{far.ipv4}", PORT))
            sink, _ = listener.accept()
            with sink, near.random_loss(0.1), far.random_loss(0.1):
                net.move(source, sink, 200_000)
                net.move(sink, source, 200_000)

    found = +lab.measure(traffic).retransmits
    assert found["ipv4", "established", "data"] > 0
    assert found["ipv4", "new_syn_recv", "synack"] >= 1
    assert {family for family, _, _ in found} == {"ipv4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_exemplars_by_local_port(load: Any, wire: Wire, family: str) -> None:
    """The server sends; some of that is lost, and its first SYN-ACK. The port keeps others' traffic apart."""
    client, server = wire
    loaded = load("tcpretrans", by="local_port")
    for end in wire:
        end.single_packets()
    with server.listen(family, PORT) as listener, client.socket(family) as near:
        with client.rule(*first(1, handshake_size(family), *SYNACK), family=family):
            near.connect(listener.getsockname()[:2])
        far, _ = listener.accept()
        with far, client.random_loss(0.1):
            net.move(far, near, 500_000)
        peer = str(near.getsockname()[1])
    addresses = {"laddr": server.address(family), "lport": str(PORT), "raddr": client.address(family), "rport": peer}
    found = {series.labels: series for series in loaded.read()[RETRANSMITS].series}
    for labels in ((family, "established", "data", str(PORT)), (family, "new_syn_recv", "synack", str(PORT))):
        exemplar = found[labels].exemplar
        assert exemplar is not None
        assert exemplar.value == 1
        assert {name: value for name, value in exemplar.labels if name != "cgroup"} == addresses


def test_one_event_for_each_retransmission(load: Any, wire: Wire) -> None:
    lab, (near, far) = Lab(load("tcpretrans", events="true", by="remote_subnet"), wire), wire
    names: set[tuple[str, ...]] = set()
    near.single_packets()

    def traffic() -> None:
        lab.loaded.engine.drain()
        lab.loaded.events.clear()
        names.clear()
        for family in FAMILIES:
            source, sink = net.connect(near, far, family)
            ends = [(each.getsockname()[0], str(each.getsockname()[1])) for each in (source, sink)]
            names.update({ends[0] + ends[1], ends[1] + ends[0]})
            with source, sink, far.random_loss(0.1):
                net.move(source, sink, 1 << 20)

    found = lab.measure(traffic)
    lab.loaded.engine.drain()
    told: Counter[tuple[str, ...]] = Counter()
    for event in lab.loaded.events:
        field = event.fields
        if (field["laddr"], field["lport"], field["raddr"], field["rport"]) in names:
            told["ipv6" if ":" in field["laddr"] else "ipv4", field["state"], field["kind"]] += field["segments"]
            assert event.message.startswith(f"TCP retransmit ({field['kind']}) {field['laddr']}:{field['lport']} -> ")
    assert {family for family, _, _ in told} == set(FAMILIES)
    assert told == +found.retransmits


def test_coverage_of_the_loaders_network_namespace(load: Any, wire: Wire) -> None:
    """The kernel's account that a reader sees is the one of its own namespace."""
    near, far = wire

    def ratio(loaded: Any) -> float | None:
        loaded.read()
        return loaded.engine.status(fresh=False)["collectors"]["tcpretrans"]["coverage"]  # type: ignore[no-any-return]

    def once() -> list[float | None]:
        with near.inside():
            lab = Lab(load("tcpretrans"), wire, own=False)
        with far.rule(*first(1, handshake_size("ipv4"), *SYNACK), family="ipv4"):  # one of ours, on the way there
            for family in FAMILIES:
                lab.bulk(family, 2 << 20, lambda end: end.random_loss(0.1))
        for end in wire:
            net.wait_for(end.quiet, f"the sockets of {end.name} to go")
        assert near.counters()["Tcp.RetransSegs"] >= tcpretrans.COLLECTOR.truth.enough  # type: ignore[union-attr]
        with near.inside():
            found = [ratio(lab.loaded)]
        with far.inside():
            found += [ratio(lab.loaded)]
        found += [ratio(lab.loaded)]
        loader.unload(lab.loaded.config)
        return found

    assert net.undisturbed(EVENTS, lambda line: False, once) == [1.0, None, None]


@pytest.mark.parametrize(("by", "more"), [("none", ()), ("remote_subnet", ("other",)), ("local_port", ("other",))])
def test_what_can_happen_is_there_at_zero(load: Any, by: str, more: tuple[str, ...]) -> None:
    loaded = load("tcpretrans", by=by)
    open_states = ("established", "close_wait", "fin_wait1", "closing", "last_ack")
    wanted = {(state, "data") for state in (*open_states, "fin_wait2")} | {(state, "probe") for state in open_states}
    wanted |= {("syn_sent", "syn"), ("syn_recv", "synack"), ("new_syn_recv", "synack")}
    assert loaded.series(RETRANSMITS).keys() >= {(family, *pair, *more) for pair in wanted for family in FAMILIES}
    assert loaded.series(FAILURES).keys() == {("ipv4",), ("ipv6",)}
