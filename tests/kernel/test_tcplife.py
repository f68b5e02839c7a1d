# SPDX-License-Identifier: Apache-2.0
"""Connections over loopback on a port of the test's own, against what the test itself did."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from collectors import tcplife
from tests.kernel.net import wait_for

pytestmark = pytest.mark.kernel
OPENED, DURATION = "bpf_tcp_connections_opened", "bpf_tcp_connection_duration_seconds"
SENT, RECEIVED = "bpf_tcp_connection_sent_bytes", "bpf_tcp_connection_received_bytes"
ADDRESS = {"ipv4": "127.0.0.1", "ipv6": "::1"}
KIND = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


class Server:
    """Takes connections one after the other and does to each what it is told."""

    def __init__(self, family: str) -> None:
        self.listener = socket.create_server((ADDRESS[family], 0), family=KIND[family], backlog=256)
        self.listener.settimeout(30)
        self.address = self.listener.getsockname()[:2]
        self.port = self.address[1]

    def serve(self, count: int, handle: Callable[[socket.socket], None]) -> threading.Thread:
        def loop() -> None:
            for _ in range(count):
                with self.listener.accept()[0] as connection:
                    connection.settimeout(30)
                    handle(connection)

        thread = threading.Thread(target=loop)
        thread.start()
        return thread


@contextmanager
def server(family: str) -> Iterator[Server]:
    one = Server(family)
    try:
        yield one
    finally:
        one.listener.close()


def drain(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def connect(one: Server) -> socket.socket:
    return socket.create_connection(one.address, timeout=30)


def closed(loaded: Any, labels: tuple[str, ...], count: int) -> None:
    """A connection's last packets are handled a moment after the program's close."""
    wait_for(lambda: loaded.series(DURATION)[labels].count >= count, f"{count} connections to close")


@pytest.mark.parametrize("forbid", ["", "tp_btf"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_opened_closed_and_payload_are_exact(load: Callable[..., Any], family: str, forbid: str) -> None:
    sizes = [0, 1, 1000, 1 << 16, 3 << 20] * 20
    with server(family) as one:
        loaded = load("tcplife", forbid=forbid, local_ports=f"[{one.port}]")
        labels = (family, "inbound", str(one.port))

        def answer(connection: socket.socket) -> None:
            drain(connection)
            connection.sendall(b"answer")

        thread = one.serve(len(sizes), answer)
        for size in sizes:
            with connect(one) as connection:
                connection.sendall(bytes(size))
                connection.shutdown(socket.SHUT_WR)  # half-closed: the answer comes after our FIN
                drain(connection)
        thread.join()
        closed(loaded, labels, len(sizes))
        assert loaded.series(OPENED)[labels] == len(sizes)
        assert loaded.series(DURATION)[labels].count == len(sizes)
        assert loaded.series(RECEIVED)[labels].sum == sum(sizes)
        assert loaded.series(SENT)[labels].sum == len(sizes) * len(b"answer")


def test_reset_connections_count_and_refused_ones_do_not(load: Callable[..., Any]) -> None:
    with server("ipv4") as one:
        loaded = load("tcplife", local_ports=f"[{one.port}]")
        labels = ("ipv4", "inbound", str(one.port))
        thread = one.serve(10, lambda connection: connection.sendall(b"12345"))
        for _ in range(10):
            with connect(one) as connection:
                assert connection.recv(5)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        thread.join()
        closed(loaded, labels, 10)
        assert loaded.series(SENT)[labels].sum == 50
    before = loaded.series(OPENED)
    for _ in range(10):
        with pytest.raises(ConnectionRefusedError):
            connect(one)
    assert loaded.series(OPENED)[labels] == before[labels] == 10


def test_duration_is_the_clients(load: Callable[..., Any]) -> None:
    with server("ipv4") as one:
        loaded = load("tcplife", local_ports=f"[{one.port}]")
        labels = ("ipv4", "inbound", str(one.port))
        thread = one.serve(1, drain)
        began = time.monotonic()
        with connect(one):
            time.sleep(0.5)
        lived = time.monotonic() - began
        thread.join()
        closed(loaded, labels, 1)
        assert loaded.series(DURATION)[labels].sum == pytest.approx(lived, rel=0.05)


def test_connection_older_than_the_programs_is_known_but_not_opened(load: Callable[..., Any]) -> None:
    with server("ipv4") as one:
        thread = one.serve(1, drain)
        with connect(one) as connection:
            connection.sendall(bytes(1000))
            time.sleep(0.05)
            loaded = load("tcplife", local_ports=f"[{one.port}]")
            connection.sendall(bytes(500))
        thread.join()
        labels = ("ipv4", "inbound", str(one.port))
        closed(loaded, labels, 1)
        assert loaded.series(OPENED)[labels] == 0
        assert loaded.series(RECEIVED)[labels].sum == 1500


def test_event_of_each_connection(load: Callable[..., Any]) -> None:
    with server("ipv4") as one:
        loaded = load("tcplife", local_ports=f"[{one.port}]", events="true")
        loaded.read()
        thread = one.serve(3, drain)
        for _ in range(3):
            with connect(one) as connection:
                connection.sendall(b"abc")
        thread.join()
        closed(loaded, ("ipv4", "inbound", str(one.port)), 3)
        loaded.engine.drain()
        mine = [event for event in loaded.events if event.fields["lport"] == str(one.port)]
        assert [event.fields["received"] for event in mine] == [3, 3, 3]
        assert {event.message_id for event in mine} == {tcplife.MESSAGE_ID}
        assert {event.fields["direction"] for event in mine} == {"inbound"}
