# SPDX-License-Identifier: Apache-2.0
"""The real daemon, scraped once a second by a real Prometheus with the shipped rules, after a real load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import pytest
import yaml

from daemon import libbpf, loader
from daemon.errors import UnsupportedError
from tests.prometheus import load

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "config" / "rules"
JOB = "bpfmetricsd"
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
Lacks = Callable[[str], NoReturn]


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


def _stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
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
        names = ("biolatency", "tcpretrans", "cachestat", "oomkill", "tcplife")
        mine = f"bpfmetricsd_test_prometheus_{os.getpid()}"
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
        wait("the daemon", lambda: get(f"{self.url}/-/ready") == b"ready\n", 120)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            _stop(self.process, number)
            self.process = None

    def remove(self) -> None:
        self.stop()
        subprocess.run([*self.command, "unload", "--config", self.config], cwd=ROOT, check=True)


@dataclass(frozen=True)
class Prometheus:
    url: str
    began: float

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer of its API."""
        try:
            answer = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        return json.loads(answer)["data"]

    def query(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Label pairs to value, now."""
        found = self.ask("query", query=expr)["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}

    def numbers(self, expr: str) -> list[float]:
        """Every number that the query gave since the test began; not NaN."""
        found = self.ask("query_range", query=expr, start=self.began, end=time.time(), step=1)["result"]
        return [value for one in found for _, text in one["values"] if (value := float(text)) == value]

    def exemplars(self, selector: str) -> list[dict[str, Any]]:
        found = self.ask("query_exemplars", query=selector, start=self.began, end=time.time())
        return [{**exemplar, "series": one["seriesLabels"]} for one in found for exemplar in one["exemplars"]]


@pytest.fixture(scope="session")
def program(lacks: Lacks) -> Callable[[str], str]:
    """`program("promtool")`: its path."""

    def find(name: str) -> str:
        package = name.replace("promtool", "prometheus")
        found = shutil.which(name, path=_PATH)
        return found or lacks(f"{name} is not installed; run 'packaging/bootstrap test', or apt install {package}")

    return find


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, lacks: Lacks) -> Iterator[Daemon]:
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    one = Daemon(tmp_path_factory.mktemp("daemon"), free_port())
    try:
        one.start()
        yield one
    finally:
        one.remove()


@pytest.fixture(scope="session")
def text_only(daemon: Daemon) -> Iterator[int]:
    """A port where the daemon is never asked for OpenMetrics: Prometheus itself always asks for it first."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = get(daemon.url + self.path, "text/plain;version=0.0.4")
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def prometheus(
    daemon: Daemon, text_only: int, program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """After the load. The OOM kill of the load comes when all has been scraped a few times."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, node_port = free_port(), free_port()
    jobs = {JOB: daemon.port, "text": text_only, "node": node_port, "prometheus": port}
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "*.yaml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]} for job, at in jobs.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    commands = (
        [program("prometheus-node-exporter"), "--collector.disable-defaults", "--collector.netstat",
         f"--web.listen-address=127.0.0.1:{node_port}", "--log.level=error"],
        [program("prometheus"), f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=error"],
    )  # fmt: skip
    with ExitStack() as undo:
        undo.callback(os.close, libbpf.enable_statistics())
        for command in commands:
            undo.callback(_stop, subprocess.Popen(command))
        one = Prometheus(f"http://127.0.0.1:{port}", time.time())
        wait("Prometheus", lambda: bool(get(f"{one.url}/-/ready")))
        wait("the first scrapes", lambda: len(one.query("up == 1")) == len(jobs))
        load.run(tmp_path_factory.mktemp("disk"), 14)
        yield one
