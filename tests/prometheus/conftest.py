# SPDX-License-Identifier: Apache-2.0
"""The real daemon, scraped once a second by a real Prometheus with the shipped rules, after a real load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NoReturn

import pytest
import yaml

from daemon import libbpf, loader
from daemon.errors import UnsupportedError
from tests.prometheus import load
from tests.prometheus.harness import JOB, RULES, Daemon, Prometheus, free_port, get, stop, wait

_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
Lacks = Callable[[str], NoReturn]


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
            try:
                page = get(daemon.url + self.path, "text/plain;version=0.0.4")
            except OSError:
                self.send_error(502)
                return
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
            undo.callback(stop, subprocess.Popen(command))
        one = Prometheus(f"http://127.0.0.1:{port}", time.time())
        wait("Prometheus", lambda: bool(get(f"{one.url}/-/ready")))
        wait("the first scrapes", lambda: len(one.query("up == 1")) == len(jobs))
        load.run(tmp_path_factory.mktemp("disk"), 14)
        yield one
