# SPDX-License-Identifier: Apache-2.0
"""The server over real sockets on loopback, in a thread; in a process of its own where signals matter."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from daemon import app, listening, look, server
from daemon.config import Listen
from daemon.errors import BpfmetricsdError, UsageError
from daemon.exposition import Renderer
from daemon.model import Exemplar, Family, Metric, Series

ROOT = Path(server.__file__).parents[1]
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
LOOPBACK = Listen("127.0.0.1", 0)
PATIENCE = 20  # seconds until a test gives up; none waits so long when all is well


@dataclass
class FakeSource:
    """Families are counters named after the selection; counts what it is asked for."""

    series: int = 1
    reasons: list[str] = field(default_factory=list)
    failure: Exception | None = None
    collected: list[frozenset[str] | None] = field(default_factory=list)
    pages: int = 0
    ticks: int = 0
    reloads: int = 0

    def names(self) -> frozenset[str]:
        return frozenset({"oomkill", "runqlat"})

    def collect(self, names: frozenset[str] | None) -> list[Family]:
        self.collected.append(names)
        self._fail()
        metric = Metric(f"reading_{len(self.collected)}", "counter", "A reading.", ("number",))
        exemplar = Exemplar((("pid", "1"),), 1.0, 1000.0 + len(self.collected))
        return [Family(metric, [Series((str(i),), i, None, exemplar) for i in range(self.series)])]

    def ready(self) -> list[str]:
        return self.reasons

    def status(self) -> dict[str, Any]:
        return {"collectors": {"oomkill": {"up": True}}}

    def page(self) -> str:
        self.pages += 1
        return "<!doctype html><title>bpfmetricsd ☃</title>"

    def tick(self) -> str:
        self.ticks += 1
        self._fail()
        return f"{self.ticks} ticks"

    def reload(self) -> str:
        self.reloads += 1
        self._fail()
        return "configuration read again"

    def _fail(self) -> None:
        if self.failure:
            raise self.failure


@dataclass
class FakeNotify:
    watchdog_interval: float | None = None
    said: list[str] = field(default_factory=list)

    def ready(self, status: str = "") -> None:
        self.said.append(f"ready {status}".strip())

    def status(self, line: str) -> None:
        self.said.append(f"status {line}")

    def reloading(self) -> None:
        self.said.append("reloading")

    def stopping(self) -> None:
        self.said.append("stopping")

    def watchdog(self) -> None:
        self.said.append("watchdog")


@dataclass
class Running:
    source: FakeSource
    notify: FakeNotify
    server: server.Server
    port: int

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response, response.read()

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        return self.ask("GET", path, headers)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the server's loop."""
        done = threading.Event()
        self.server._loop.call_soon_threadsafe(function)
        self.server._loop.call_soon_threadsafe(done.set)
        assert done.wait(PATIENCE)

    def connections(self) -> int:
        return len(self.server.connections)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)


@contextlib.contextmanager
def serving(
    source: FakeSource | None = None, notify: FakeNotify | None = None, interval: float = 3600, **more: Any
) -> Iterator[Running]:
    source, notify = source or FakeSource(), notify or FakeNotify()
    sockets = listening.open_sockets([LOOPBACK])
    port = sockets[0].getsockname()[1]
    running = Running(source, notify, server.Server(source, sockets, interval, notify, **more), port)
    thread = threading.Thread(target=lambda: asyncio.run(running.server.run()))
    thread.start()
    try:
        wait_for(lambda: any(line.startswith("ready") for line in notify.said))
        yield running
    finally:
        running.server._loop.call_soon_threadsafe(running.server.stop)
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    with serving() as found:
        yield found


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_count(running: Running, connections: int) -> None:
    wait_for(lambda: running.connections() == connections)


def is_cut_off(client: socket.socket) -> bool:
    """Whether the server ends the connection before we lose patience."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1 << 16):
            pass
    return True


# Routes


@pytest.mark.parametrize(
    ("path", "status", "content_type", "body"),
    [
        ("/-/healthy", 200, "text/plain; charset=utf-8", b"healthy\n"),
        ("/-/ready", 200, "text/plain; charset=utf-8", b"ready\n"),
        ("/", 200, "text/html; charset=utf-8", "<!doctype html><title>bpfmetricsd ☃</title>".encode()),
        ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", None),
        ("/status", 200, "application/json", None),
        ("/nothing", 404, "text/plain; charset=utf-8", None),
        ("/metrics/", 404, "text/plain; charset=utf-8", None),
        ("/%00", 404, "text/plain; charset=utf-8", None),
    ],
)
def test_route(running: Running, path: str, status: int, content_type: str, body: bytes | None) -> None:
    response, found = running.get(path)
    assert (response.status, response.headers["Content-Type"]) == (status, content_type)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Date"]
    assert "Server" not in response.headers
    assert body is None or found == body
    assert status == 200 or found.count(b"\n") == 1


def test_not_ready_says_why(running: Running) -> None:
    running.source.reasons = ["oomkill: no BTF", "runqlat: refused\nby the verifier"]
    response, body = running.get("/-/ready")
    assert (response.status, body) == (503, b"oomkill: no BTF\nrunqlat: refused by the verifier\n")


def test_status_is_json(running: Running) -> None:
    assert json.loads(running.get("/status")[1]) == running.source.status()


def test_page_may_load_nothing(running: Running) -> None:
    policy = running.get("/")[0].headers["Content-Security-Policy"]
    assert policy == look.POLICY
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_pages_of_a_moment_are_one(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    assert running.get("/")[1] == running.get("/")[1]
    assert running.source.pages == 1


@pytest.mark.parametrize("path", ["/", "/metrics", "/status", "/-/healthy", "/-/ready", "/nothing"])
@pytest.mark.parametrize("headers", [{}, {"Accept-Encoding": "gzip"}, OPENMETRICS])
def test_head_is_get_without_the_body(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    head, nothing = running.ask("HEAD", path, headers)
    get, body = running.get(path, headers)
    assert (head.status, nothing) == (get.status, b"")
    assert int(head.headers["Content-Length"]) == len(body)
    different = {"date"}
    assert {(k.lower(), v) for k, v in head.getheaders() if k.lower() not in different} == {
        (k.lower(), v) for k, v in get.getheaders() if k.lower() not in different
    }


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
@pytest.mark.parametrize("path", ["/metrics", "/nothing"])
def test_other_methods(running: Running, method: str, path: str) -> None:
    response, body = running.ask(method, path)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    assert body == b"only GET and HEAD are answered here\n"


def test_a_failure_is_one_answer(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.source.failure = RuntimeError("the map is gone")
    response, body = running.get("/metrics")
    assert (response.status, body.count(b"\n")) == (500, 1)
    assert b"map" not in body
    assert "the map is gone" in caplog.text
    running.source.failure = None
    assert running.get("/metrics")[0].status == 200


# /metrics


def test_formats_and_encodings(running: Running) -> None:
    for headers in ({}, OPENMETRICS):
        plain, text = running.get("/metrics", headers)
        packed, body = running.get("/metrics", {**headers, "Accept-Encoding": "gzip"})
        assert gzip.decompress(body).splitlines()[1:2] == text.splitlines()[1:2]
        assert packed.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in plain.headers
        assert packed.headers["Content-Type"] == plain.headers["Content-Type"]
        assert plain.headers["Vary"] == packed.headers["Vary"] == "Accept, Accept-Encoding"
        assert text.endswith(b"# EOF\n") == bool(headers)


def test_accept_given_twice_is_one_list(running: Running) -> None:
    with running.connect() as client:
        client.sendall(
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: text/html\r\n"
            b"Accept: application/openmetrics-text\r\n\r\n"
        )
        assert b"content-type: application/openmetrics-text" in read_all(client).lower()


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", None),
        ("?other=1", None),
        ("?collect[]=oomkill", {"oomkill"}),
        ("?collect%5B%5D=oomkill&collect[]=runqlat&collect[]=oomkill", {"oomkill", "runqlat"}),
    ],
)
def test_collect_chooses(running: Running, query: str, names: set[str] | None) -> None:
    assert running.get(f"/metrics{query}")[0].status == 200
    assert running.source.collected == [names]


@pytest.mark.parametrize("query", ["collect[]=nope", "collect[]=", "collect[]=oomkill&collect[]=%0d%0aX:%20%ff"])
def test_unknown_collector(running: Running, query: str) -> None:
    response, body = running.get(f"/metrics?{query}")
    assert response.status == 400
    assert body.endswith(b"; there are oomkill, runqlat\n")
    assert body.count(b"\n") == 1
    assert body.isascii()
    assert running.source.collected == []


class CountingRenderer(Renderer):
    """Keeps (openmetrics, since) of each rendering."""

    calls: ClassVar[list[tuple[bool, int]]] = []

    def render(self, families: Sequence[Family], openmetrics: bool, *, turn: int = 1, since: int = 0) -> bytes:
        self.calls.append((openmetrics, since))
        return super().render(families, openmetrics, turn=turn, since=since)


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    monkeypatch.setattr(CountingRenderer, "calls", [])
    monkeypatch.setattr(app, "Renderer", CountingRenderer)
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    return CountingRenderer.calls


def test_one_moment_shares_a_snapshot(renderings: list[tuple[bool, int]], running: Running) -> None:
    variants = [{}, OPENMETRICS, {"Accept-Encoding": "gzip"}, {**OPENMETRICS, "Accept-Encoding": "gzip"}]
    pages = {running.get("/metrics", headers)[1] for headers in variants * 3}
    assert len(pages) == 4
    assert running.source.collected == [None]
    assert sorted(renderings) == [(False, 0), (True, 0)]
    running.get("/metrics?collect[]=oomkill")
    assert running.source.collected == [None, {"oomkill"}]


def test_the_moment_passes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 0)
    running.get("/metrics")
    wait_for(lambda: b"reading_1_total" not in running.get("/metrics")[1])


EXEMPLAR = b'# {pid="1"}'


@pytest.fixture
def one_exemplar(running: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """The same in each reading, and each request has a reading of its own."""
    families = running.source.collect(None)
    monkeypatch.setattr(running.source, "collect", lambda names: families)
    monkeypatch.setattr(app, "SHARE_SECONDS", 0)
    return running


def test_head_and_text_leave_the_exemplars(one_exemplar: Running) -> None:
    one_exemplar.ask("HEAD", "/metrics", OPENMETRICS)
    one_exemplar.get("/metrics")
    assert EXEMPLAR in one_exemplar.get("/metrics", OPENMETRICS)[1]
    wait_for(lambda: EXEMPLAR not in one_exemplar.get("/metrics", OPENMETRICS)[1])


def test_each_reader_gets_an_exemplar_once(one_exemplar: Running) -> None:
    """Both servers of a pair, and a person with curl between their scrapes."""
    for name in ("Prometheus/2.42", "Prometheus/3.5", "curl/7.88"):
        headers = {**OPENMETRICS, "User-Agent": name}
        for path in ("/metrics", "/metrics?collect[]=oomkill"):  # as two scrape jobs
            assert EXEMPLAR in one_exemplar.get(path, headers)[1]
            wait_for(lambda path=path, headers=headers: EXEMPLAR not in one_exemplar.get(path, headers)[1])  # type: ignore[misc]


def test_readers_are_bounded() -> None:
    readers = app.Readers()
    assert [readers.since(1, turn, head) for turn, head in ((5, True), (5, False), (5, False), (6, False))] == [
        0,
        0,
        0,
        5,
    ]
    for reader in range(2, app.MAX_READERS + 2):
        assert readers.since(reader, 7, head=False) == 0
    assert readers.since(2, 8, head=False) == 7
    assert readers.since(1, 8, head=False) == 0, "forgotten"


# Connections


def test_a_connection_is_used_again(running: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        for method, path in (("GET", "/metrics"), ("POST", "/"), ("HEAD", "/"), ("GET", "/nothing"), ("GET", "/")):
            connection.request(method, path)
            connection.getresponse().read()
            sock = connection.sock
            assert sock is not None
        assert running.connections() == 1


def test_pipelined_requests(running: Running) -> None:
    with running.connect() as client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        client.sendall(b"GET /-/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = read_all(client)
    assert answers.count(b"\r\n\r\nhealthy\n") == 20
    assert answers.endswith(b"ready\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a server without
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * (1 << 17) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (1 << 15),
        b"\r\n" * 5 + b"\0",
    ],
    ids=["tls", "length", "target", "headers", "nul"],
)
def test_nonsense_ends_the_connection(running: Running, request_bytes: bytes) -> None:
    with running.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(request_bytes)
        assert is_cut_off(client)
    assert running.get("/-/healthy")[0].status == 200


def test_upgrade_is_not_followed(running: Running) -> None:
    response, _ = running.get("/-/healthy", {"Connection": "Upgrade", "Upgrade": "websocket"})
    assert response.status in (200, 400)  # old versions of uvicorn refuse, new ones ignore it
    assert "websockets" not in sys.modules


HALF_OPEN = {
    "silent": b"",
    "half a line": b"GET /met",
    "headers": b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
    "body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n1",
    "second request": b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\nGET",
}


@pytest.mark.parametrize("sent", HALF_OPEN.values(), ids=HALF_OPEN.keys())
def test_half_open_client_is_cut_off(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    with serving() as running, running.connect() as client:
        client.sendall(sent)
        assert is_cut_off(client)
        wait_for(lambda: running.connections() == 0)


def test_a_drip_does_not_extend_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with serving() as running, running.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                client.sendall(b"a: b\r\n")
                time.sleep(0.02)
        assert time.monotonic() < end


def test_many_half_open_clients_do_not_hinder_a_scrape(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        for sent in list(HALF_OPEN.values()) * 20:
            stack.enter_context(running.connect()).sendall(sent)
        assert running.get("/metrics")[0].status == 200


def test_the_oldest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    with serving() as running, contextlib.ExitStack() as stack:
        clients = []
        for count in range(1, 9):
            clients.append(stack.enter_context(running.connect()))
            wait_for_count(running, min(count, 5))
        assert all(is_cut_off(client) for client in clients[:3])
        assert running.get("/metrics")[0].status == 200
        assert is_cut_off(clients[3])
        clients[7].sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(clients[7]).endswith(b"healthy\n")


def test_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    with serving(FakeSource(series=300_000)) as running, running.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: running.source.collected)
        wait_for(lambda: running.connections() == 0)


def test_long_answer_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    with serving(FakeSource(series=100_000)) as running:
        for headers in ({}, {"Accept-Encoding": "gzip"}):
            response, body = running.get("/metrics", headers)
            text = gzip.decompress(body) if headers else body
            assert int(response.headers["Content-Length"]) == len(body)
            assert text.endswith(b'{number="99999"} 99999\n')


# Life


def test_tick_and_status() -> None:
    with serving(interval=0.01) as running:
        wait_for(lambda: running.source.ticks > 3)
    assert running.notify.said[:3] == ["ready 1 ticks", "status 2 ticks", "status 3 ticks"]
    assert running.notify.said[-1] == "stopping"


def test_failing_tick_is_logged_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    source = FakeSource(failure=RuntimeError("no memory"))
    with serving(source, FakeNotify(watchdog_interval=0.001), interval=0.01) as running:
        wait_for(lambda: source.ticks > 3)
        source.failure = None
        wait_for(lambda: any(line.startswith("status") for line in running.notify.said))
    assert caplog.text.count("periodic work failed: no memory") == 1


def test_watchdog_is_fed_until_ticks_fail() -> None:
    source, notify = FakeSource(), FakeNotify(watchdog_interval=0.01)
    with serving(source, notify, interval=0.01):
        wait_for(lambda: notify.said.count("watchdog") > 3)
        source.failure = RuntimeError("stuck")

        def starves() -> bool:
            before = len(notify.said)
            ticks = source.ticks
            wait_for(lambda: source.ticks > ticks + 3)
            return len(notify.said) == before

        wait_for(starves)
        source.failure = None
        fed = notify.said.count("watchdog")
        wait_for(lambda: notify.said.count("watchdog") > fed)


def test_reload(running: Running) -> None:
    running.call(running.server.reload)
    assert running.notify.said[-2:] == ["reloading", "ready configuration read again"]


def test_bad_configuration_stays_in_the_status(caplog: pytest.LogCaptureFixture) -> None:
    with serving(interval=0.01) as running:
        wait_for(lambda: running.source.ticks)
        running.source.reload = refuse  # type: ignore[method-assign]  # a fake of a fake
        running.call(running.server.reload)
        assert "ready configuration not read again: c.yaml:3: no" in running.notify.said
        wait_for(lambda: re.search(r"status \d+ ticks; configuration not read again: c.yaml", running.notify.said[-1]))
        assert running.get("/metrics")[0].status == 200
        del running.source.reload
        running.call(running.server.reload)
        wait_for(lambda: re.fullmatch(r"status \d+ ticks", running.notify.said[-1]))
    assert "c.yaml:3: no" in caplog.text
    assert "Traceback" not in caplog.text


def refuse() -> str:
    raise UsageError("c.yaml:3: no")


SERVICE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from daemon.notify import Notifier
from daemon.listening import open_sockets
from daemon.server import serve
from test_server import FakeSource, LOOPBACK
serve(FakeSource(), open_sockets([LOOPBACK]), 0.05, Notifier())
print("served", flush=True)
"""


@contextlib.contextmanager
def service(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int, socket.socket]]:
    """A process that serves, its port, and the socket that hears its notifications."""
    code = SERVICE.format(root=str(ROOT), tests=str(Path(__file__).parent))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(PATIENCE)
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "100000"}
        environment.pop("WATCHDOG_PID", None)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        with process:
            try:
                assert process.stdout
                match = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())
                assert match
                yield process, int(match[1]), manager
            finally:
                process.kill()


def hear(manager: socket.socket, wanted: str) -> str:
    """The next notification with `wanted` in it."""
    while True:
        text = manager.recv(4096).decode()
        if wanted in text:
            return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_clients_connected(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("systemd.daemon", reason="install python3-systemd")
    with service(tmp_path) as (process, port, manager), contextlib.ExitStack() as stack:
        assert hear(manager, "READY=1") == "READY=1\nSTATUS=1 ticks"
        hear(manager, "WATCHDOG=1")
        hear(manager, "STATUS=2 ticks")
        for sent in HALF_OPEN.values():
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(sent)
        process.send_signal(number)
        hear(manager, "STOPPING=1")
        output, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, output) == (0, "served\n")


def test_hangup_reloads(tmp_path: Path) -> None:
    pytest.importorskip("systemd.daemon", reason="install python3-systemd")
    with service(tmp_path) as (process, _, manager):
        hear(manager, "READY=1")
        process.send_signal(signal.SIGHUP)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", hear(manager, "RELOADING"))
        assert hear(manager, "READY") == "READY=1\nSTATUS=configuration read again"
        assert process.poll() is None


# Sockets


def test_sockets_are_not_inherited() -> None:
    for sock in listening.open_sockets([LOOPBACK, Listen("localhost", 0)]):
        with sock:
            assert not sock.get_inheritable()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_all_addresses_and_both_families_side_by_side() -> None:
    (everywhere,) = listening.open_sockets([Listen("", 0)])
    with everywhere:
        port = everywhere.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    if not socket.has_ipv6 or everywhere_is_ipv4(everywhere):
        pytest.skip("no IPv6 on this machine")
    with contextlib.ExitStack() as stack:
        (four,) = listening.open_sockets([Listen("0.0.0.0", 0)])
        stack.enter_context(four)
        (six,) = listening.open_sockets([Listen("::", four.getsockname()[1])])
        stack.enter_context(six)
        assert [listening.url(sock, False) for sock in (four, six)] == [
            f"http://0.0.0.0:{four.getsockname()[1]}",
            f"http://[::]:{four.getsockname()[1]}",
        ]


def everywhere_is_ipv4(sock: socket.socket) -> bool:
    return sock.family == socket.AF_INET


def test_address_in_use_names_it_and_closes_the_others() -> None:
    (taken,) = listening.open_sockets([LOOPBACK])
    with taken:
        port = taken.getsockname()[1]
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(BpfmetricsdError) as failure:
            listening.open_sockets([LOOPBACK, Listen("127.0.0.1", port)])
        assert str(failure.value).startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use; stop the")
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("host", "remedy"),
    [("192.0.2.1", "no interface has this address"), ("no-such-host.invalid", "write an address of this machine")],
)
def test_address_that_is_not_ours(host: str, remedy: str) -> None:
    with pytest.raises(BpfmetricsdError, match=remedy) as failure:
        listening.open_sockets([Listen(host, 0)])
    assert "\n" not in str(failure.value)


def test_forbidden_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbid)
    with pytest.raises(BpfmetricsdError, match=r"cannot listen on 127\.0\.0\.1:80: Permission denied; start as root"):
        listening.open_sockets([Listen("127.0.0.1", 80)])


PASSED = """
import os, sys
if "LISTEN_FDS" in os.environ:
    os.dup2({fd}, 3)
sys.path.insert(0, {root!r})
os.environ["LISTEN_PID"] = str(os.getpid())
if {hide}:
    sys.modules["systemd.daemon"] = None
from daemon.config import Listen
from daemon.errors import BpfmetricsdError
from daemon.listening import open_sockets, url
try:
    print(*(url(sock, True) for sock in open_sockets([Listen(fd=True)])), os.environ.get("LISTEN_FDS"))
except BpfmetricsdError as error:
    print(error)
"""


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("kind", "printed"),
    [
        (socket.SOCK_STREAM, "https://127.0.0.1:{port} None\n"),
        (socket.SOCK_DGRAM, "cannot listen on fd://: file descriptor 3 is no listening stream socket; use Listen"),
        (None, "cannot listen on fd://: systemd passed no socket; start the socket unit"),
    ],
)
def test_sockets_from_systemd(hide: bool, kind: socket.SocketKind | None, printed: str) -> None:
    with socket.socket(socket.AF_INET, kind or socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        code = PASSED.format(root=str(ROOT), hide=hide, fd=sock.fileno())
        environment = {**os.environ, **({"LISTEN_FDS": "1"} if kind else {})}
        result = subprocess.run(
            [sys.executable, "-c", code],
            pass_fds=[sock.fileno()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert result.stdout.startswith(printed.format(port=sock.getsockname()[1])), result.stderr
