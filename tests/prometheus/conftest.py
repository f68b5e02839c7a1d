# SPDX-License-Identifier: Apache-2.0
"""The real daemon, scraped once a second by real Prometheus servers with the shipped rules, after a real load.

Two servers watch the same load: the one of the host's Debian, and Prometheus 3 (see `newer`). Both send their alerts to
one Alertmanager, and it to a webhook of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import collectors
from daemon import libbpf, loader
from daemon.errors import UnsupportedError
from tests.kernel import net
from tests.kernel.net import End
from tests.prometheus import load, newer
from tests.prometheus.harness import (
    HOST,
    JOB,
    NATIVE,
    NEWER,
    NO_NEWER,
    RULES,
    SERVERS,
    Daemon,
    Prometheus,
    Receiver,
    Watched,
    free_port,
    get,
    impatient,
    serve,
    stop,
    wait,
)

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


@pytest.fixture(scope="session", params=SERVERS)
def promtool(request: pytest.FixtureRequest, program: Callable[[str], str], lacks: Lacks) -> Callable[..., str]:
    """`promtool("check", "rules", file)`: what it says, of each version."""
    path = program("promtool")
    if request.param == NEWER:
        path = shutil.which("promtool", path=newer.FOLDER) or lacks(NO_NEWER)

    def run(*words: str | Path, text: bytes = b"") -> str:
        done = subprocess.run([path, *words], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode()
        return done.stdout.decode()

    return run


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

    def page(path: str, _: bytes) -> bytes | None:
        try:
            return get(daemon.url + path, "text/plain;version=0.0.4")
        except OSError:
            return None

    with serve(page, "text/plain; version=0.0.4") as port:
        yield port


@pytest.fixture(scope="session")
def wire(lacks: Lacks) -> Iterator[tuple[End, End]]:
    with net.wire(lacks) as ends:
        yield ends


@pytest.fixture(scope="session")
def node(program: Callable[[str], str], wire: tuple[End, End]) -> Iterator[int]:
    """The port of a node_exporter that counts segments where those that are lost are sent from."""
    port = free_port()
    with ExitStack() as undo:
        inside = subprocess.Popen(["ip", "netns", "exec", wire[0].name, "sleep", "infinity"])
        undo.callback(stop, inside)
        command = [
            program("prometheus-node-exporter"), "--collector.disable-defaults", "--collector.netstat",
            f"--path.procfs=/proc/{inside.pid}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ]  # fmt: skip
        undo.callback(stop, subprocess.Popen(command))
        yield port


def _with_templates() -> list[str]:
    """Debian's Alertmanager wants its templates in /usr/share; where it is not installed, it alone sees them there."""
    if Path("/usr/share/prometheus/alertmanager").is_dir():
        return []
    script = 'mount -t tmpfs tmpfs /usr/share && cp -r "$0" /usr/share/ && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, f"{sys.prefix}/share/prometheus"]


@pytest.fixture(scope="session")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="session")
def alertmanager(
    program: Callable[[str], str], receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Its port. Each alert is a notification of its own, at once."""
    folder, port = tmp_path_factory.mktemp("alertmanager"), free_port()

    def take(_: str, body: bytes) -> bytes:
        receiver.notified += json.loads(body)["alerts"]
        return b""

    with ExitStack() as undo:
        webhook = f"http://127.0.0.1:{undo.enter_context(serve(take))}/"
        settings = {
            "route": {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"},
            "receivers": [{"name": "test", "webhook_configs": [{"url": webhook}]}],
        }
        (folder / "alertmanager.yaml").write_text(yaml.safe_dump(settings))
        command = [
            *_with_templates(), program("prometheus-alertmanager"), f"--config.file={folder}/alertmanager.yaml",
            f"--storage.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=", "--log.level=error",
        ]  # fmt: skip
        undo.callback(stop, subprocess.Popen(command))
        wait("Alertmanager", lambda: get(f"http://127.0.0.1:{port}/-/ready") is not None)
        yield port


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    shutil.copy(RULES / "recording.yaml", folder)
    (folder / "alerting.yaml").write_text(impatient((RULES / "alerting.yaml").read_text()))
    return folder


def settings(server: str, ports: dict[str, int], rules: Path, alertmanager: int) -> dict[str, Any]:
    """Of a server that scrapes these jobs, and where it can, the daemon once more with its histograms converted."""
    convert = {"convert_classic_histograms_to_nhcb": True, "always_scrape_classic_histograms": True}
    jobs = {name: (port, {}) for name, port in ports.items()}
    if server == NEWER:
        # What it collects tells it from the other job: each reader gets an exemplar once.
        jobs[NATIVE] = (ports[JOB], {**convert, "params": {"collect[]": [one.name for one in collectors.ALL]}})
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s", "external_labels": {"server": server}},
        "rule_files": [f"{rules}/*.yaml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}], **more}
            for job, (port, more) in jobs.items()
        ],
    }


@pytest.fixture(scope="session")
def watched(
    daemon: Daemon,
    text_only: int,
    node: int,
    alertmanager: int,
    rules: Path,
    wire: tuple[End, End],
    program: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    """The OOM kill of the load comes when all has been scraped a few times."""
    programs = {HOST: program("prometheus"), NEWER: shutil.which("prometheus", path=newer.FOLDER)}
    features = {HOST: "exemplar-storage", NEWER: "exemplar-storage,native-histograms"}
    with ExitStack() as undo:
        undo.callback(os.close, libbpf.enable_statistics())
        servers = {}
        for name, path in programs.items():
            if not path:
                continue
            folder, port = tmp_path_factory.mktemp(name), free_port()
            jobs = {JOB: daemon.port, "text": text_only, "node": node, "prometheus": port}
            (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings(name, jobs, rules, alertmanager)))
            command = [
                path, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}", f"--enable-feature={features[name]}", "--log.level=error",
            ]  # fmt: skip
            undo.callback(stop, subprocess.Popen(command))
            servers[name] = Prometheus(name, f"http://127.0.0.1:{port}", time.time())
        for one in servers.values():
            wait_for_targets(one)
        yield Watched(servers, load.run(tmp_path_factory.mktemp("disk"), wire, 14))


def wait_for_targets(one: Prometheus) -> None:
    def up() -> bool:
        targets = one.ask("targets")["activeTargets"]
        return bool(targets) and len(one.query("up == 1")) == len(targets)

    wait(f"the first scrapes of {one.url}", up)


@pytest.fixture(params=SERVERS)
def prometheus(request: pytest.FixtureRequest, watched: Watched, lacks: Lacks) -> Prometheus:
    return watched.servers.get(request.param) or lacks(NO_NEWER)
