# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process: without privilege, without LLVM, small, and no count lost while it is away."""

from __future__ import annotations

import calendar
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.foreground import KEEPS_CAP_BPF
from daemon.privileges import CAP_BPF
from tests.kernel.load import loop_device
from tests.kernel.memory import oom_kill

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., AbstractContextManager["Daemon"]]
OPENMETRICS = {"Accept": "application/openmetrics-text"}


@dataclass
class Daemon:
    """A running daemon; `log` is what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    url: str
    errors: Path

    @property
    def log(self) -> str:
        return self.errors.read_text()

    def server(self) -> int:
        """The process that listens: the one that the socket's inode belongs to."""
        port = int(self.url.rsplit(":", 1)[1])
        inode = next(
            line.split()[9]
            for line in Path("/proc/net/tcp").read_text().splitlines()
            if line.split()[1] == f"0100007F:{port:04X}" and line.split()[3] == "0A"
        )
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if os.readlink(descriptor) == f"socket:[{inode}]":
                    return int(descriptor.parts[2])
            except OSError:
                continue
        raise AssertionError("nobody listens")

    def get(self, path: str = "/metrics") -> str:
        request = urllib.request.Request(self.url + path, headers=OPENMETRICS)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def value(self, series: str) -> float:
        match = re.search(rf"^{re.escape(series)} (\S+)", self.get(), re.MULTILINE)
        return float(match.group(1)) if match else 0.0


def kernel() -> tuple[int, ...]:
    """Its version, where that is what a promise names."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def config(folders: tuple[Path, Path]) -> Path:
    """A configuration file with all six collectors, as readable as one in /etc."""
    port = free_port()
    file = folders[1].parent / "bpfmetricsd.yaml"
    names = ("biolatency", "runqlat", "tcpretrans", "cachestat", "oomkill", "tcplife")
    file.write_text(
        f"server: {{listen: '127.0.0.1:{port}'}}\ninterval: 1s\nbpffs: {folders[0]}\nstate: {folders[1]}\n"
        f"collectors: {{{', '.join(f'{name}: {{}}' for name in names)}}}\n"
    )
    return file


@pytest.fixture
def daemon(config: Path) -> Start:
    """`with daemon("run") as one:` starts a command and waits for the line that says it listens."""

    @contextmanager
    def start(command: str, *more: str) -> Iterator[Daemon]:
        errors = config.parent / f"{command}-{time.monotonic_ns()}.err"
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "daemon", command, "--config", str(config), *more],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, text=True,
            )  # fmt: skip
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("listening on "):
                    yield Daemon(process, line.split()[2].rstrip("/"), errors)
                    return
            pytest.fail(f"{command} ended with {process.wait()}: {errors.read_text()}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(10)

    return start


def test_server_has_no_privilege_no_compiler_and_stays_small(daemon: Start) -> None:
    with daemon("run") as one:
        page = one.get()
        assert re.findall(r"^bpfmetricsd_collector_up\{.*\} (\S+)", page, re.MULTILINE) == ["1"] * 6
        server = one.server()
        status = Path(f"/proc/{server}/status").read_text()
        assert re.search(r"^Uid:\t(\d+)", status, re.MULTILINE).group(1) != "0"  # type: ignore[union-attr]
        keeps = KEEPS_CAP_BPF in json.loads(one.get("/status"))["notes"]
        assert not keeps or kernel() < (5, 19)
        allowed = {0, 1 << CAP_BPF} if keeps else {0}
        sets = re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\t(\S+)", status, re.MULTILINE)
        assert {int(one, 16) for one in sets} == allowed
        mapped = {
            line.split(maxsplit=5)[5] for line in Path(f"/proc/{server}/maps").read_text().splitlines() if "/" in line
        }
        assert not [path for path in mapped if re.search("llvm|clang|bcc", path, re.IGNORECASE)]
        for _ in range(720):  # an hour of scrapes at five seconds
            one.get()
        resident = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{server}/status").read_text(), re.MULTILINE)
        assert resident
        assert int(resident.group(1)) <= 32 << 10
        one.process.terminate()
        assert one.process.wait(10) == 0


def test_no_count_is_lost_while_the_server_is_dead(daemon: Start, tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk") as disk:
        series = f'bpf_block_io_duration_seconds_count{{device="{disk.name}",operation="read"}}'
        with daemon("run") as one:
            disk.read(10)
            before = one.value(series)
            assert before >= 10
            os.kill(one.server(), signal.SIGKILL)
            one.process.wait(10)
        disk.read(1000)
        with daemon("serve") as one:
            assert one.value(series) == before + 1000


def test_oom_kill_is_told_after_the_restart_with_its_own_time(daemon: Start) -> None:
    with daemon("run") as one:
        one.get()
        os.kill(one.server(), signal.SIGKILL)
        one.process.wait(10)
    earliest = time.time()
    oom_kill("bpfmetricsd-test.service")
    latest = time.time()
    time.sleep(1.1)  # so that the time of the restart could not be taken for the kill's
    with daemon("serve") as one:
        deadline = time.monotonic() + 10
        while "OOM kill" not in one.log and time.monotonic() < deadline:
            time.sleep(0.1)
        line = next(line for line in one.log.splitlines() if "OOM kill" in line)
    assert "bpfmetricsd-test.service" in line
    stamp = time.strptime(line[:19], "%Y-%m-%dT%H:%M:%S")
    assert int(earliest) <= calendar.timegm(stamp) <= latest


def test_terminated_it_leaves_the_programs_counting(daemon: Start, folders: tuple[Path, Path]) -> None:
    with daemon("run") as one:
        one.get()
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(
        ("biolatency", "runqlat", "tcpretrans", "cachestat", "oomkill", "tcplife")
    )


def test_unload_on_exit_leaves_nothing(daemon: Start, folders: tuple[Path, Path]) -> None:
    with daemon("run", "--unload-on-exit") as one:
        one.get()
        one.process.terminate()
        assert one.process.wait(20) == 0
    assert not folders[0].exists()


def test_reload_reads_the_configuration_again(daemon: Start, config: Path) -> None:
    with daemon("run") as one:
        text = config.read_text()
        config.write_text(text.replace("cachestat: {}", "cachestat: {typo: 1}"))
        os.kill(one.server(), signal.SIGHUP)
        deadline = time.monotonic() + 10
        while "typo" not in one.log and time.monotonic() < deadline:
            time.sleep(0.1)
        assert re.search(r"bpfmetricsd\.yaml:5: .*typo", one.log)
        assert 'bpfmetricsd_collector_up{collector="cachestat"} 1' in one.get()
        config.write_text(text.replace("cachestat: {}, ", ""))
        os.kill(one.server(), signal.SIGHUP)
        while 'collector="cachestat"' in one.get() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert 'collector="cachestat"' not in one.get()
