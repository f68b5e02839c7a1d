# SPDX-License-Identifier: Apache-2.0
"""Connections between two namespaces, on ports of the test's own, against what the test itself did, on both sides.

Both ends of each connection are counted: the server's as inbound by the port it listens on, the client's as outbound by
the port that the test binds it to.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest

from collectors import tcplife
from tests.accuracy import compared
from tests.kernel import net
from tests.kernel.net import End

pytestmark = pytest.mark.kernel
OPENED, DURATION = "bpf_tcp_connections_opened", "bpf_tcp_connection_duration_seconds"
SENT, RECEIVED = "bpf_tcp_connection_sent_bytes", "bpf_tcp_connection_received_bytes"
EVENTS = ("sock/inet_sock_set_state",)
FAMILIES = ("ipv4", "ipv6")
SERVER, CLIENTS = 21100, range(21101, 21161)  # below the range of automatic ports
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
FAST_OPEN = 0x1 | 0x2 | 0x4 | 0x200 | 0x400  # as client and server, without a cookie, for all that listen

Wire = tuple[End, End]
Handle = Callable[[socket.socket], None]


class Totals(NamedTuple):
    """Of the connections of one direction: how many, and their payload."""

    opened: int
    closed: int
    sent: int
    received: int


NOTHING = Totals(0, 0, 0, 0)


class Lab:
    """The namespaces of a client and a server, and what the collector says of what goes on between them."""

    def __init__(self, wire: Wire, load: Callable[..., Any], **options: Any) -> None:
        self.near, self.far = wire
        self.loaded = load("tcplife", local_ports=[SERVER, *CLIENTS], **options)
        self._before = {pair: self._totals(*pair) for pair in product(FAMILIES, tcplife.DIRECTIONS)}

    def totals(self, family: str, direction: str) -> Totals:
        """Since this was made, of the test's ports."""
        found = zip(self._totals(family, direction), self._before[family, direction], strict=True)
        return Totals(*(now - then for now, then in found))

    def _totals(self, family: str, direction: str) -> Totals:
        families = self.loaded.read()

        def values(metric: str) -> list[Any]:
            return [one.value for one in families[metric].series if one.labels[:2] == (family, direction)
                    and one.labels[2] != "other"]  # fmt: skip

        opened, durations = sum(values(OPENED)), values(DURATION)
        closed = sum(one.count for one in durations)
        return Totals(opened, closed, *(sum(one.sum for one in values(metric)) for metric in (SENT, RECEIVED)))

    def settle(self) -> None:
        """A connection's last packets are handled a moment after the program's close."""
        for end in (self.near, self.far):
            net.wait_for(end.quiet, f"the sockets of {end.name} to go")
        time.sleep(0.05)  # a socket leaves the kernel's table just before it is counted

    def measure(self, family: str, traffic: Callable[[], object]) -> tuple[Totals, Totals]:
        """What the traffic added: the client's side, the server's."""

        def sides() -> tuple[Totals, Totals]:
            return self.totals(family, "outbound"), self.totals(family, "inbound")

        def once() -> tuple[Totals, Totals]:
            before = sides()
            traffic()
            self.settle()
            client, server = (
                Totals(*(now - then for now, then in zip(*pair, strict=True)))
                for pair in zip(sides(), before, strict=True)
            )
            return client, server

        return net.undisturbed(EVENTS, lambda line: False, once)

    def agrees(self, found: tuple[Totals, Totals], expected: tuple[Totals, Totals]) -> None:
        """Client and server."""
        for ours, true in zip(found, expected, strict=True):
            compared(self.loaded, "connections", ours.opened + ours.closed, true.opened + true.closed)
            compared(self.loaded, "bytes", ours.sent + ours.received, true.sent + true.received)
        assert found == expected

    @contextmanager
    def serving(self, family: str, count: int, handle: Handle) -> Iterator[None]:
        """Takes connections one after the other and does to each what it is told; waits for that at the end."""

        def loop() -> None:
            for _ in range(count):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(30)
                    handle(connection)

        with self.far.listen(family, SERVER) as listener:
            listener.settimeout(30)
            thread = threading.Thread(target=loop)
            thread.start()
            try:
                yield
            finally:
                thread.join()

    def connect(self, family: str, port: int = CLIENTS[0]) -> socket.socket:
        found = self.near.socket(family, port)
        found.settimeout(30)
        found.connect((self.far.address(family), SERVER))
        return found


@pytest.fixture(scope="module")
def wire(lacks: Callable[[str], object]) -> Iterator[Wire]:
    with net.wire(lacks) as ends:
        yield ends


@pytest.fixture
def lab(wire: Wire, shared: Callable[..., Any]) -> Lab:
    return Lab(wire, shared)


def drain(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


@pytest.mark.parametrize("forbid", ["", "tp_btf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_closed_connections(wire: Wire, shared: Callable[..., Any], family: str, forbid: str) -> None:
    """The answer comes after the client's FIN."""
    lab = Lab(wire, shared, forbid=forbid)
    sizes = [0, 1, 1000, 1 << 16, 3 << 20] * 12

    def answer(connection: socket.socket) -> None:
        drain(connection)
        connection.sendall(b"answer")

    def traffic() -> None:
        with lab.serving(family, len(sizes), answer):
            for port, size in zip(CLIENTS, sizes, strict=True):
                with lab.connect(family, port) as connection:
                    connection.sendall(bytes(size))
                    connection.shutdown(socket.SHUT_WR)
                    drain(connection)

    client, server = lab.measure(family, traffic)
    count, sent, answered = len(sizes), sum(sizes), 6 * len(sizes)
    lab.agrees((client, server), (Totals(count, count, sent, answered), Totals(count, count, answered, sent)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_closes_first_and_the_same_addresses_come_soon_again(lab: Lab, family: str) -> None:
    """Each connection has the ports of the one before, whose end the server's side still has in TIME_WAIT."""
    sizes = iter([0, 1, 1000, 1 << 16] * 50 * 8)  # enough for all attempts
    count, sent = 200, [0]

    def give(connection: socket.socket) -> None:
        size = next(sizes)
        sent[0] += size
        connection.sendall(bytes(size))

    def traffic() -> None:
        sent[0] = 0
        with lab.serving(family, count, give):
            for _ in range(count):
                with lab.connect(family) as connection:
                    drain(connection)
                net.wait_for(lab.near.quiet, "the client's side to let its port go")

    client, server = lab.measure(family, traffic)
    lab.agrees((client, server), (Totals(count, count, 0, sent[0]), Totals(count, count, sent[0], 0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_many_at_once_that_the_client_closes_first(lab: Lab, family: str) -> None:
    def traffic() -> None:
        with lab.serving(family, len(CLIENTS), drain), ExitStack() as undo:
            for number, connection in enumerate([undo.enter_context(lab.connect(family, port)) for port in CLIENTS]):
                connection.sendall(bytes(number))

    client, server = lab.measure(family, traffic)
    count, sent = len(CLIENTS), sum(range(len(CLIENTS)))
    lab.agrees((client, server), (Totals(count, count, sent, 0), Totals(count, count, 0, sent)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_megabytes_each_way(lab: Lab, family: str) -> None:
    size = 100_000_000

    def exchange(connection: socket.socket) -> None:
        net.move(connection, connection, size)

    def traffic() -> None:
        with lab.serving(family, 1, exchange), lab.connect(family) as connection:
            exchange(connection)

    lab.agrees(lab.measure(family, traffic), (Totals(1, 1, size, size),) * 2)


def both_move(connection: socket.socket) -> None:
    net.move(connection, connection, 5)


@pytest.mark.parametrize("by_server", [False, True], ids=["by the client", "by the server"])
@pytest.mark.parametrize("family", FAMILIES)
def test_resets(lab: Lab, family: str, by_server: bool) -> None:
    """A reset sends no FIN."""
    count = 10

    def reset(connection: socket.socket) -> None:
        both_move(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def is_reset(connection: socket.socket) -> None:
        both_move(connection)
        with pytest.raises(ConnectionResetError):
            drain(connection)

    def traffic() -> None:
        with lab.serving(family, count, reset if by_server else is_reset):
            for port in CLIENTS[:count]:
                with lab.connect(family, port) as connection:
                    (is_reset if by_server else reset)(connection)

    lab.agrees(lab.measure(family, traffic), (Totals(count, count, 5 * count, 5 * count),) * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nobody_reads_has_been_received(lab: Lab, family: str) -> None:
    """A socket that is closed with data in it resets its connection."""

    def give(connection: socket.socket) -> None:
        connection.sendall(b"12345")
        with pytest.raises(ConnectionResetError):
            drain(connection)

    def traffic() -> None:
        with lab.serving(family, 1, give), lab.connect(family) as connection:
            assert connection.recv(5, socket.MSG_PEEK | socket.MSG_WAITALL) == b"12345"

    lab.agrees(lab.measure(family, traffic), (Totals(1, 1, 0, 5), Totals(1, 1, 5, 0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_connections_do_not_count(lab: Lab, family: str) -> None:
    def traffic() -> None:
        for port in CLIENTS[:10]:
            with pytest.raises(ConnectionRefusedError):
                lab.connect(family, port)

    lab.agrees(lab.measure(family, traffic), (NOTHING, NOTHING))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_that_is_gone_before_the_servers_end(lab: Lab, family: str) -> None:
    """The client's socket ends when the server has taken its FIN: what waits in FIN_WAIT2 then is no socket."""
    seen: list[Totals] = []

    def hold(connection: socket.socket) -> None:
        drain(connection)
        net.wait_for(lambda: lab.totals(family, "outbound").closed == 1, "the client's side to close")
        seen.append(lab.totals(family, "inbound"))

    with lab.serving(family, 1, hold), lab.connect(family) as connection:
        connection.sendall(bytes(1000))
    lab.settle()
    assert seen == [Totals(1, 0, 0, 0)]
    assert lab.totals(family, "outbound") == Totals(1, 1, 1000, 0)
    assert lab.totals(family, "inbound") == Totals(1, 1, 0, 1000)


@pytest.mark.parametrize("lost", ["nothing", "SYN", "SYN-ACK"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_open(lab: Lab, family: str, lost: str, lacks: Callable[[str], object]) -> None:
    """The SYN carries data; the server may read it, answer and be done before the handshake is."""
    if not all(end.sysctl("net.ipv4.tcp_fastopen", str(FAST_OPEN)) for end in (lab.near, lab.far)):
        lacks("this kernel has no TCP Fast Open")
    header = 60 if family == "ipv4" else 80
    matches = {
        "SYN": (lab.far, header + 112, "--syn"),
        "SYN-ACK": (lab.near, header, "--tcp-flags", "SYN,ACK", "SYN,ACK"),
    }

    def answer(connection: socket.socket) -> None:
        net.receive(connection, 100)
        connection.sendall(b"answer")

    def traffic() -> None:
        with ExitStack() as undo:
            if lost in matches:
                end, size, *match = matches[lost]
                rule = ("INPUT", "-p", "tcp", *match, "-m", "quota", "--quota", str(size), "-j", "DROP")
                undo.enter_context(end.rule(*rule, family=family))
            undo.enter_context(lab.serving(family, 1, answer))
            with lab.near.socket(family, CLIENTS[0]) as connection:
                there = (lab.far.address(family), SERVER)
                assert connection.sendto(bytes(100), socket.MSG_FASTOPEN, there) == 100
                drain(connection)

    lab.agrees(lab.measure(family, traffic), (Totals(1, 1, 100, 6), Totals(1, 1, 6, 100)))


def test_ipv4_through_an_ipv6_socket_is_ipv4(lab: Lab) -> None:
    def traffic() -> None:
        with lab.far.listen("ipv6", SERVER, "::") as listener, lab.near.socket("ipv6") as source:
            source.bind(("::", CLIENTS[0]))
            source.connect((f"::ffff:{lab.far.ipv4}", SERVER))
            sink, _ = listener.accept()
            with sink:
                net.move(source, sink, 1000)

    assert lab.measure("ipv4", traffic) == (Totals(1, 1, 1000, 0), Totals(1, 1, 0, 1000))
    assert lab.totals("ipv6", "inbound") == lab.totals("ipv6", "outbound") == NOTHING


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("family", FAMILIES)
def test_connections_older_than_the_programs_are_known_but_not_opened(
    wire: Wire, load: Callable[..., Any], family: str, side: str
) -> None:
    """One is open both ways then, one is half closed by the client, one by the server.

    The kernel shows the sockets of one network namespace, which is the loader's.
    """

    def both(source: socket.socket, sink: socket.socket) -> None:
        net.move(source, sink, 1000)
        net.move(sink, source, 100)

    near, far = wire
    with ExitStack() as undo:
        listener = undo.enter_context(far.listen(family, SERVER))
        pairs = []
        for port in CLIENTS[:3]:
            source = undo.enter_context(near.socket(family, port))
            source.connect(listener.getsockname()[:2])
            pairs.append((source, undo.enter_context(listener.accept()[0])))
            both(*pairs[-1])
        pairs[1][0].shutdown(socket.SHUT_WR)
        drain(pairs[1][1])
        pairs[2][1].shutdown(socket.SHUT_WR)
        drain(pairs[2][0])
        with (near if side == "client" else far).inside():
            lab = Lab(wire, load)
        both(*pairs[0])
        net.move(pairs[1][1], pairs[1][0], 10)
        net.move(*pairs[2], 10)
    lab.settle()
    assert lab.totals(family, "outbound") == (Totals(0, 3, 4010, 410) if side == "client" else NOTHING)
    assert lab.totals(family, "inbound") == (Totals(0, 3, 410, 4010) if side == "server" else NOTHING)


def _durations(lab: Lab, direction: str, ends: Sequence[str]) -> dict[str, float]:
    """By the client's port, in seconds."""
    port = "lport" if direction == "outbound" else "rport"
    return {
        event.fields[port]: event.fields["duration_ns"] / 1e9
        for event in lab.loaded.events
        if event.fields["direction"] == direction and event.fields[port] in ends
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_durations_are_those_of_the_clients_own_clock(wire: Wire, load: Callable[..., Any], family: str) -> None:
    lab = Lab(wire, load, events="true")
    lab.loaded.read()
    lived: dict[str, float] = {}
    lengths = (0.8, 1.2, 1.6)

    def live(port: int, seconds: float) -> None:
        with lab.near.socket(family, port) as connection:
            began = time.monotonic()
            connection.connect((lab.far.address(family), SERVER))
            time.sleep(seconds)
            connection.close()
            lived[str(port)] = time.monotonic() - began

    def traffic() -> None:
        lab.loaded.engine.drain()
        lab.loaded.events.clear()
        with lab.far.listen(family, SERVER) as listener:
            threads = [threading.Thread(target=live, args=pair) for pair in zip(CLIENTS, lengths, strict=False)]
            for thread in threads:
                thread.start()
            for _ in threads:  # the shortest first
                connection, _ = listener.accept()
                threading.Thread(target=lambda one=connection: (drain(one), one.close())).start()  # type: ignore[misc]
            for thread in threads:
                thread.join()

    lab.measure(family, traffic)
    lab.loaded.engine.drain()
    for direction in tcplife.DIRECTIONS:
        assert _durations(lab, direction, list(lived)) == pytest.approx(lived, rel=0.05)
        found = lab.loaded.read()[DURATION].series
        total = sum(one.value.sum for one in found if one.labels[1] == direction and one.labels[2] != "other")
        assert total >= sum(lived.values()) * 0.95


def test_event_of_each_connection(wire: Wire, load: Callable[..., Any]) -> None:
    lab = Lab(wire, load, events="true")
    lab.loaded.read()

    def traffic() -> None:
        lab.loaded.engine.drain()
        lab.loaded.events.clear()
        with lab.serving("ipv4", 3, drain):
            for port in CLIENTS[:3]:
                with lab.connect("ipv4", port) as connection:
                    connection.sendall(b"abc")

    lab.measure("ipv4", traffic)
    lab.loaded.engine.drain()
    inbound = [event for event in lab.loaded.events if event.fields["lport"] == str(SERVER)]
    outbound = [event for event in lab.loaded.events if event.fields["rport"] == str(SERVER)]
    assert [event.fields["received"] for event in inbound] == [3, 3, 3]
    assert [event.fields["sent"] for event in outbound] == [3, 3, 3]
    assert [event.fields["lport"] for event in outbound] == [str(port) for port in CLIENTS[:3]]
    assert {event.message_id for event in (*inbound, *outbound)} == {tcplife.MESSAGE_ID}
    assert {event.fields["direction"] for event in inbound} == {"inbound"}
    assert {event.fields["direction"] for event in outbound} == {"outbound"}
