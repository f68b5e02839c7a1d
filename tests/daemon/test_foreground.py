# SPDX-License-Identifier: Apache-2.0
"""The commands at work on this kernel, as root: loading, serving, signals, privileges, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon import commands, foreground, loader, privileges
from daemon.config import Config
from daemon.errors import UnsupportedError

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Machine:
    """A configuration of its own, whose folders the service's user can reach; `stop` undoes all."""

    folder: Path
    bpffs: Path
    port: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "config.yaml"

    def write(self, body: str = "collectors: {runqlat: {}, oomkill: {}}") -> None:
        head = f"server: {{listen: '127.0.0.1:{self.port}'}}\nbpffs: {self.bpffs}\nstate: {self.folder}/state\n"
        self.file.write_text(f"{head}interval: 1s\n{body}\n")

    def call(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "daemon", command, "--config", str(self.file), *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        """From a folder that is not the project's; returns when it listens."""
        process = subprocess.Popen(
            [sys.executable, "-m", "daemon", command, "--config", str(self.file), *arguments],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout
        for line in process.stdout:
            if line == f"listening on http://127.0.0.1:{self.port}\n":
                return process
        raise AssertionError(f"{command} ended with status {process.wait()}")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def until(self, path: str, words: str) -> str:
        """The answer that holds these words; ticks come every second."""
        deadline = time.monotonic() + 20
        while words not in (text := self.get(path)[1]):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait(30)
            if process.stdout:
                process.stdout.close()
        loader.unload(Config(collectors={}, bpffs=self.bpffs, state=self.folder / "state"))
        shutil.rmtree(self.folder)
        assert not self.bpffs.exists()


@pytest.fixture
def machine(lacks: Callable[[str], None]) -> Iterator[Machine]:
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    if os.geteuid() != 0:
        lacks("needs root, to become another user; use sudo")
    folder = Path(tempfile.mkdtemp(prefix="bpfmetricsd_"))
    folder.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = Machine(folder, Path(f"/sys/fs/bpf/{folder.name}"), port)
    made.write()
    yield made
    made.stop()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in lines)}


def test_load_status_show_unload(machine: Machine) -> None:
    done = machine.call("load")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^runqlat +loaded +\S+:sched_switch (exact|approximate)$", done.stdout, re.MULTILINE)
    assert re.search(r"^runqlat +kept +\S+:sched_switch", machine.call("load").stdout, re.MULTILINE)
    assert machine.call("status").stdout.startswith("all is well: 2 of 2 collectors up, ")
    found = json.loads(machine.call("status", "--json").stdout)
    assert (found["ready"], found["reasons"], found["collectors"]["runqlat"]["up"]) == (True, [], True)
    assert "     usecs               : count     distribution\n" in machine.call("show", "runqlat").stdout
    assert re.match(r"\n\d\d:\d\d:\d\d\n", machine.call("show", "runqlat", "0.1", "1").stdout)
    done = machine.call("unload", "--only", "oomkill")
    assert (done.returncode, done.stdout) == (0, "unloaded oomkill\n")
    done = machine.call("status")
    assert done.returncode == 1
    assert done.stdout.startswith("not well: 1 of 2 collectors up")
    assert machine.call("unload").stdout == "unloaded runqlat\n"
    assert not machine.bpffs.exists()
    assert machine.call("unload").stdout == f"nothing was loaded in {machine.bpffs}\n"
    done = machine.call("show", "runqlat")
    assert (done.returncode, done.stdout) == (1, "")
    assert "runqlat: not loaded; run 'bpfmetricsd load'" in done.stderr


def test_check_loads_nothing(machine: Machine) -> None:
    done = machine.call("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^runqlat: exact\n  sched_switch  tp_btf:sched_switch$", done.stdout, re.MULTILINE)
    assert not machine.bpffs.exists()


def test_run_serves_as_an_ordinary_user_and_leaves_the_programs(machine: Machine) -> None:
    process = machine.start("run", "--user", "nobody")
    own = facts(process.pid)
    assert len(set(own["Uid"].split())) == 1
    assert own["Uid"].split()[0] != "0"
    assert (own["CapEff"], own["CapPrm"], own["Groups"], own["NoNewPrivs"]) == ("0" * 16, "0" * 16, "", "1")
    machine.until("/-/ready", "ready\n")
    assert 'bpfmetricsd_collector_up{collector="runqlat"} 1' in machine.get("/metrics")[1]
    assert json.loads(machine.get("/status")[1])["bpffs"] == str(machine.bpffs)
    assert "<svg" in machine.get("/")[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert sorted(path.name for path in machine.bpffs.iterdir()) == ["oomkill", "runqlat"]


def test_a_reload_takes_the_new_file_and_keeps_the_old_one_in_force_where_it_is_wrong(machine: Machine) -> None:
    process = machine.start("run")
    machine.write("collectors: {runqlat: {}}\njournal: false")
    process.send_signal(signal.SIGHUP)
    status = json.loads(machine.until("/status", "to put journal in force"))
    assert list(status["collectors"]) == ["runqlat"]
    machine.write("collectors: {runqlatt: {}}")
    process.send_signal(signal.SIGHUP)
    assert list(json.loads(machine.get("/status")[1])["collectors"]) == ["runqlat"]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_what_is_loaded_while_it_serves_is_served(machine: Machine) -> None:
    machine.start("serve")
    assert machine.get("/-/ready")[0] == 503
    assert machine.call("load").returncode == 0
    machine.until("/-/ready", "ready\n")
    machine.call("unload", "--only", "oomkill")
    machine.until("/-/ready", "oomkill: not loaded")
    machine.call("unload")
    machine.until("/-/ready", "the folder of pins was removed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_unload_on_exit_leaves_nothing(machine: Machine, number: signal.Signals) -> None:
    process = machine.start("run", "--unload-on-exit")
    (server,) = children(process)
    assert facts(server)["Uid"].split()[0] != "0"
    process.send_signal(signal.SIGHUP)
    machine.until("/-/ready", "ready\n")
    process.send_signal(number)
    assert process.wait(30) == 0
    assert not machine.bpffs.exists()
    assert not Path(f"/proc/{server}").exists()


def test_unload_on_exit_also_when_the_server_is_killed(machine: Machine) -> None:
    process = machine.start("run", "--unload-on-exit")
    os.kill(children(process)[0], signal.SIGKILL)
    assert process.wait(30) == 1
    assert not machine.bpffs.exists()


def test_an_address_in_use_is_one_line_and_unload_on_exit_holds(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", machine.port)):
        done = machine.call("run", "--unload-on-exit")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{machine.port}: Address already in use" in done.stderr
    assert not machine.bpffs.exists()


def test_run_goes_on_with_the_collectors_that_load(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write("collectors: {runqlat: {}, tcpretrans: {}}")
    assert machine.call("load", "--only", "runqlat").returncode == 0
    monkeypatch.setenv(loader.FORBID, "tp_btf,raw_tp,fentry,fexit,kprobe,kretprobe")
    done = machine.call("load", "--only", "tcpretrans")
    assert done.returncode == 1
    assert done.stderr.startswith("bpfmetricsd: tcpretrans: this kernel allows no hook for ")
    machine.start("run")
    assert "tcpretrans: this kernel allows no hook" in machine.until("/-/ready", "tcpretrans: ")
    assert 'bpfmetricsd_collector_up{collector="runqlat"} 1' in machine.get("/metrics")[1]
    machine.call("unload", "--only", "runqlat")
    done = machine.call("run")
    assert (done.returncode, "listening" in done.stdout) == (1, False)


def test_pins_of_another_group_are_a_plain_refusal(machine: Machine) -> None:
    assert machine.call("load", "--user", "nobody").returncode == 0
    done = machine.call("serve", "--user", "daemon")
    assert done.returncode == 1
    assert done.stderr.endswith("was loaded for another user than daemon; run 'bpfmetricsd load --user daemon'\n")


def test_where_the_kernel_wants_it_the_server_keeps_one_capability_and_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    machine.call("load", "--user", "nobody")
    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(foreground, "reads_maps", lambda user, bpffs: False)
            job = foreground.Job(machine.file, commands.read_config, "nobody", machine.bpffs.stat().st_gid)
            bpffs, notes = foreground._step_down(job, commands.read_config(machine.file))
            os.write(write_end, f"{bpffs}|{notes}|{facts(os.getpid())['CapEff']}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer == f".|{[foreground.KEEPS_CAP_BPF]}|{1 << privileges.CAP_BPF:016x}"


def test_an_ordinary_user_is_told_what_to_use(machine: Machine) -> None:
    machine.call("load")

    def call(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-m", "daemon", command, "--config", str(machine.file)],
            cwd="/", env={"PYTHONPATH": str(ROOT)}, user="nobody", group="daemon", extra_groups=[],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    for command in ("status", "load", "unload", "run"):
        done = call(command)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
        assert "use sudo" in done.stderr


def test_a_folder_that_only_root_may_read_holds_the_program(machine: Machine) -> None:
    """As when root runs it from its home: after the drop of privileges nothing of it can be imported any more."""
    home = machine.folder / "home"
    home.mkdir(mode=0o700)
    for name in ("daemon", "collectors", "bpf", "config"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "run", "--config", str(machine.file), "--user", "nobody"],
        cwd=home, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    machine.processes.append(process)
    assert process.stdout
    assert any(line.startswith("listening on") for line in process.stdout)
    for path in ("/", "/metrics", "/status", "/-/healthy"):
        assert machine.get(path)[0] == 200
    process.send_signal(signal.SIGHUP)
    machine.until("/-/ready", "ready\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
