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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daemon import app, listening, server
from daemon.config import Listen
from daemon.errors import BpfmetricsdError, UsageError
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

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes]:
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
        self.server._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)


@contextlib.contextmanager
def serving(
    source: FakeSource | None = None, notify: FakeNotify | None = None, interval: float = 3600, **more: Any
) -> Iterator[Running]:
    source, notify = source or FakeSource(), notify or FakeNotify()
    sockets = server.open_sockets([LOOPBACK])
    port = sockets[0].getsockname()[1]
    running = Running(source, notify, server.Server(source, sockets, interval, notify, **more), port)
    thread = threading.Thread(target=lambda: asyncio.run(running.server.run()))
    thread.start()
    try:
        wait_for(lambda: "ready" in notify.said)
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
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy


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


def test_one_moment_shares_a_snapshot(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    rendered = count_renderings(running)
    variants = [{}, OPENMETRICS, {"Accept-Encoding": "gzip"}, {**OPENMETRICS, "Accept-Encoding": "gzip"}]
    pages = {running.get("/metrics", headers)[1] for headers in variants * 3}
    assert len(pages) == 4
    assert running.source.collected == [None]
    assert sorted(rendered) == [(False, False), (True, True)]
    running.get("/metrics?collect[]=oomkill")
    assert running.source.collected == [None, {"oomkill"}]


def test_the_moment_passes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 0.01)
    running.get("/metrics")
    time.sleep(0.1)
    assert b"reading_2_total" in running.get("/metrics")[1]


def test_head_and_text_leave_the_exemplars(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SHARE_SECONDS", 3600)
    rendered = count_renderings(running)
    running.ask("HEAD", "/metrics", OPENMETRICS)
    running.get("/metrics")
    assert sorted(rendered) == [(False, False), (True, False)]
    assert b'# {pid="1"}' in running.get("/metrics", OPENMETRICS)[1]
    running.ask("HEAD", "/metrics", OPENMETRICS)
    assert sorted(rendered) == [(False, False), (True, False), (True, True)]


def count_renderings(running: Running) -> list[tuple[bool, bool]]:
    """(openmetrics, mark) of each rendering from now on."""
    application = next(iter_applications(running))
    renderer, calls = application._renderer, []
    render = renderer.render

    def counted(families: list[Family], openmetrics: bool, *, mark: bool = True) -> bytes:
        calls.append((openmetrics, mark))
        return render(families, openmetrics, mark=mark)

    renderer.render = counted
    return calls
