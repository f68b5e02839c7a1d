# SPDX-License-Identifier: Apache-2.0
"""The daemon and Prometheus as processes, and the questions that the tests ask them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from tests.prometheus import load

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "config" / "rules"
JOB = "bpfmetricsd"
HOST, NEWER = SERVERS = ("host", "newer")  # of the host's Debian, and Prometheus 3
NO_NEWER = "Prometheus 3 is not unpacked; run '.venv/bin/python -m tests.prometheus.newer' as root"
NATIVE = "native"  # the job whose histograms Prometheus 3 also stores as native ones


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(url: str, accept: str = "*/*") -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=30) as answer:
        return bytes(answer.read())


def wait(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class Daemon:
    """`bpfmetricsd run` in folders of its own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "daemon"]

    @property
    def config(self) -> Path:
        return self.folder / "bpfmetricsd.yaml"

    def start(self) -> None:
        mine = f"bpfmetricsd_prometheus_{os.getpid()}"
        names = ("biolatency", "tcpretrans", "cachestat", "oomkill", "tcplife")
        settings = {
            "server": {"listen": f"127.0.0.1:{self.port}"},
            "bpffs": f"/sys/fs/bpf/{mine}",
            "state": f"/run/{mine}",
            "journal": False,
            "defaults": {"exemplar_interval": "1s"},
            "collectors": {**{name: {} for name in names}, "runqlat": {"by": "cgroup"}},
        }
        self.config.write_text(yaml.safe_dump(settings))
        self.process = subprocess.Popen([*self.command, "run", "--config", self.config], cwd=ROOT)
        wait("the daemon", self._ready, 120)

    def _ready(self) -> bool:
        assert self.process
        assert self.process.poll() is None, "the daemon ended; what it said is above"
        return get(f"{self.url}/-/ready") == b"ready\n"

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            stop(self.process, number)
            self.process = None

    def remove(self) -> None:
        self.stop()
        subprocess.run([*self.command, "unload", "--config", self.config], cwd=ROOT, check=True)


@dataclass(frozen=True)
class Prometheus:
    name: str
    url: str
    began: float

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer of its API."""
        try:
            answer = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        return json.loads(answer)["data"]

    def query(self, expr: str, at: float | None = None) -> dict[tuple[tuple[str, str], ...], float]:
        """Label pairs to value, now or at a time."""
        found = self.ask("query", query=expr, **({} if at is None else {"time": at}))["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}

    def series(self, expr: str) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and every number that the query gave since the test began; not NaN."""
        found = self.ask("query_range", query=expr, start=self.began, end=time.time(), step=1)["result"]
        return [
            (one["metric"], [value for _, text in one["values"] if (value := float(text)) == value]) for one in found
        ]

    def numbers(self, expr: str) -> list[float]:
        return [value for _, values in self.series(expr) for value in values]

    def exemplars(self, selector: str) -> list[dict[str, Any]]:
        found = self.ask("query_exemplars", query=selector, start=self.began, end=time.time())
        return [{**exemplar, "series": one["seriesLabels"]} for one in found for exemplar in one["exemplars"]]


@dataclass(frozen=True)
class Watched:
    """The servers by name, after the load that they watched."""

    servers: dict[str, Prometheus]
    load: load.Done


def impatient(rules: str) -> str:
    """The shipped alerting rules with one change: where an alert waits for N minutes (`for: Nm`), N seconds.

    Expressions and their windows stay as they are. A window that reaches back to before the first scrape is no longer
    than what was scraped.
    """
    return re.sub(r"^( +for: \d+)m$", r"\1s", rules, flags=re.MULTILINE)


class Receiver:
    """What Alertmanager's webhook brought."""

    def __init__(self) -> None:
        self.notified: list[dict[str, Any]] = []

    def wait(self, status: str, **labels: str) -> dict[str, Any]:
        """The first alert that has this status and these labels."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.notified if one["status"] == status and labels.items() <= one["labels"].items()]

        wait(f"a notification ({status}: {labels})", lambda: bool(found()))
        return found()[0]


@contextmanager
def serve(answer: Callable[[str, bytes], bytes | None], kind: str = "text/plain") -> Iterator[int]:
    """An HTTP server on loopback; its port. `answer(path, body)`, where nothing is an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = answer(self.path, self.rfile.read(int(self.headers["Content-Length"] or 0)))
            if page is None:
                self.send_error(502)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(page)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
