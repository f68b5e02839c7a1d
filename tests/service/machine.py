# SPDX-License-Identifier: Apache-2.0
"""A machine with a real systemd: systemd-nspawn on a throw-away layer above the cached root.

It has a network of its own with one address that the host reaches, and a bpffs of its own. The BPF programs in it see
the whole host, as there is one kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, THEIRS = "198.18.77.1", "198.18.77.2"  # from the range that RFC 2544 keeps for tests
PORT = 10435
BOOT_S, STOP_S, COMMAND_S = 60, 30, 300
_ENVIRONMENT = (
    "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", "DEBIAN_FRONTEND=noninteractive",
)  # fmt: skip
_IS_RUNNING = ("systemctl", "is-system-running")
_HIERARCHIES = ("", "unified", "systemd")  # cgroup v2 alone, or beside v1
Done = subprocess.CompletedProcess[str]
_NSPAWN_STATE = Path("/run/systemd/nspawn")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """What `condition` returns once that is true. It may raise OSError meanwhile."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Machine:
    """`leader` is the host's id of its first process, `bpffs` its /sys/fs/bpf as the host sees it."""

    name: str
    leader: int
    bpffs: Path

    def run(self, *command: str, check: bool = True, stdin: str = "", cwd: str = "/") -> Done:
        """As root in the machine; both outputs in `stdout`."""
        enter = ["nsenter", "-t", str(self.leader), "-a", "env", "-i", "-C", cwd, *_ENVIRONMENT]
        done = subprocess.run(
            [*enter, *command], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=COMMAND_S,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{self.log()}")
        return done

    def write(self, path: str, text: str) -> None:
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("sh", "-c", f"cat >{path}", stdin=text)

    def log(self) -> str:
        return self.run("journalctl", "-q", "--no-pager", "-n", "40", "-u", "bpfmetricsd*", check=False).stdout

    def show(self, unit: str, key: str) -> str:
        return self.run("systemctl", "show", "-p", key, "--value", unit).stdout.strip()

    def pid(self) -> str:
        """The server's, in the machine."""
        return self.show("bpfmetricsd.service", "MainPID")

    def proc(self) -> dict[str, str]:
        """/proc/PID/status of the server."""
        lines = self.run("cat", f"/proc/{self.pid()}/status").stdout.splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        lines = self.run("journalctl", "-q", "--no-pager", "-o", "json", *matches, check=False).stdout.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def scrape(self) -> dict[str, float]:
        """Samples by name and labels, as the host gets them."""
        with urllib.request.urlopen(f"http://{THEIRS}:{PORT}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def booted(root: Path, packages: Path) -> Iterator[Machine]:
    """Boots; `packages` is /packages in there. Nothing of it is left afterwards, whatever happened inside."""
    name = f"bpfm{os.getpid()}"
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-")))
        bpffs = folder / "bpf"
        bpffs.mkdir()
        _command("mount", "-t", "bpf", "-o", "mode=0700", name, str(bpffs))
        undo.callback(_command, "umount", str(bpffs))
        groups = _groups(name)
        undo.callback(_remove_groups, groups)
        console = undo.enter_context(open(folder / "console", "w+"))
        joins = " ".join(f"echo $$ >{group}/cgroup.procs;" for group in groups)
        nspawn = (
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", f"--machine={name}", "--volatile=overlay"),
            *("--keep-unit", "--register=no", "--console=pipe", "--network-veth", "--capability=all"),
            *("--drop-capability=CAP_SYS_MODULE", "--system-call-filter=bpf perf_event_open"),
            *(f"--bind={bpffs}:/sys/fs/bpf", f"--bind-ro={packages}:/packages", "--resolv-conf=off", "--timezone=off"),
            *("--link-journal=no", "--kill-signal=SIGRTMIN+3"),
        )
        process = subprocess.Popen(
            ["sh", "-c", f'{joins} exec "$@"', "sh", *nspawn], stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}, start_new_session=True,
        )  # fmt: skip
        undo.callback(_stop, process, name)
        try:
            leader = wait_for(lambda: _leader(process), "systemd", BOOT_S)
            machine = Machine(name, leader, bpffs)
            wait_for(lambda: "running" in machine.run(*_IS_RUNNING, check=False).stdout, "running", BOOT_S)
        except AssertionError as error:
            console.seek(0)
            raise AssertionError(f"{error}\n{console.read()}") from None
        _command("ip", "address", "add", f"{OURS}/30", "dev", f"ve-{name}"[:15])
        _command("ip", "link", "set", f"ve-{name}"[:15], "up")
        inside = ("nsenter", "-t", str(leader), "-n", "ip")
        _command(*inside, "address", "add", f"{THEIRS}/30", "dev", "host0")
        _command(*inside, "link", "set", "host0", "up")
        yield machine


def remove_group(group: Path) -> None:
    """A cgroup whose last process may be about to end."""

    def removed() -> bool:
        group.rmdir()
        return True

    wait_for(removed, f"{group} is empty", 10)


def leftovers(name: str) -> list[str]:
    """What a machine has left on the host."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if name in line]
    found += [str(path) for path in _NSPAWN_STATE.glob(f"*/*{name}*")]
    found += [str(group) for group in _paths(name) if group.exists()]
    found += [str(path) for path in Path("/sys/class/net").glob(f"ve-{name}*")]
    found += [str(path) for path in Path(tempfile.gettempdir()).glob(f"{name}*")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--machine={name}".encode() in path.read_bytes():
                found.append(str(path))
    return found


def _command(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)


def _leader(process: subprocess.Popen[bytes]) -> int:
    """The machine's first process, once it is systemd."""
    if process.poll() is not None:
        raise AssertionError(f"systemd-nspawn ended with status {process.returncode}")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    pids = [int(child) for child in children if Path(f"/proc/{child}/comm").read_text().strip() == "systemd"]
    return pids[0] if pids else 0


def _stop(process: subprocess.Popen[bytes], name: str) -> None:
    """Powers off; after STOP_S pulls the plug."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
            break
    for folder in _NSPAWN_STATE.glob(f"*/{name}"):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _paths(name: str) -> list[Path]:
    return [Path("/sys/fs/cgroup") / hierarchy / name for hierarchy in _HIERARCHIES]


def _groups(name: str) -> list[Path]:
    """A cgroup for the machine in each hierarchy that systemd uses, as nspawn leaves its own behind."""
    made = [group for group in _paths(name) if (group.parent / "cgroup.procs").exists()]
    for group in made:
        group.mkdir()
    return made


def _remove_groups(groups: list[Path]) -> None:
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            remove_group(Path(folder))
