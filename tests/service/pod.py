# SPDX-License-Identifier: Apache-2.0
"""A pod without Kubernetes: the image by the steps of a Dockerfile, its containers by systemd-nspawn.

What a container runtime would take from the manifest, nspawn is told: command, user, capabilities, mounts, read-only
root, no new privileges, the pod's network. A node's folders are folders of this test, but for its cgroups.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.packaging.kustomize import Document, one
from tests.service import machine
from tests.service.machine import Done, wait_for

# nspawn's own filter stands for the runtime's default, which allows these to the loader because of its capabilities.
_FILTER = "bpf perf_event_open"
_ASK = """\
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Accept": sys.argv[2]})
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=10).read())
"""


@dataclass(slots=True)
class Node:
    """`image` is the root of all containers, `folders` say where the paths of this node lie on the host."""

    name: str
    image: Path
    folder: Path
    folders: dict[str, Path]
    groups: list[Path]

    def place(self, path: str) -> Path:
        """Where a path of the node lies."""
        for prefix, folder in self.folders.items():
            if path.startswith(prefix):
                return folder / path.removeprefix(prefix).lstrip("/")
        raise AssertionError(f"{path}: the manifest mounts a folder that this node does not have")

    def init(self, documents: list[Document]) -> Done:
        """Runs the init container to its end; both outputs in `stdout`."""
        (container,) = _pod(documents)["initContainers"]
        return subprocess.run(
            self._command(documents, container), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=machine.COMMAND_S, env=_environment(),
        )  # fmt: skip

    @contextlib.contextmanager
    def server(self, documents: list[Document], *before: str) -> Iterator[Server]:
        """Starts the other container, with the words `before` before its command. It is killed at the end."""
        (container,) = _pod(documents)["containers"]
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        with open(log, "ab") as written:
            process = subprocess.Popen(
                self._command(documents, container, before), stdin=subprocess.DEVNULL, stdout=written, stderr=written,
                env=_environment(), start_new_session=True,
            )  # fmt: skip
        running = Server(self.name, container["ports"][0]["containerPort"], process, log)
        try:
            wait_for(lambda: "listening on" in running.said() or process.poll() is not None, "the server")
            assert process.poll() is None, running.said()
            yield running
        finally:
            running.kill()

    def _command(self, documents: list[Document], container: Document, before: Sequence[str] = ()) -> list[str]:
        context = container["securityContext"]
        granted = {f"CAP_{name}" for name in context["capabilities"].get("add", ())}
        assert context["capabilities"]["drop"] == ["ALL"]
        options = [
            "--quiet", f"--directory={self.image}", f"--machine={self.name}", "--keep-unit", "--register=no",
            "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
            f"--network-namespace-path=/run/netns/{self.name}", f"--system-call-filter={_FILTER}",
            *(f"--capability={name}" for name in sorted(granted)),
            *(f"--drop-capability={name}" for name in _capabilities() if name not in granted),
            f"--user={context['runAsUser']}" if context["runAsUser"] else "--user=root",
            *(["--read-only"] if context["readOnlyRootFilesystem"] else []),
            f"--no-new-privileges={'no' if context['allowPrivilegeEscalation'] else 'yes'}",
        ]  # fmt: skip
        volumes = {volume["name"]: volume for volume in _pod(documents)["volumes"]}
        for mount in container["volumeMounts"]:
            source = self._volume(documents, volumes[mount["name"]])
            options.append(f"--bind{'-ro' if mount.get('readOnly') else ''}={source}:{mount['mountPath']}")
        joins = " ".join(f"echo $$ >{group}/cgroup.procs;" for group in self.groups)
        words = [*container["command"], *container["args"]]
        return ["sh", "-c", f'{joins} exec "$@"', "sh", "systemd-nspawn", *options, "--", *before, *words]

    def _volume(self, documents: list[Document], volume: Document) -> Path:
        if "hostPath" in volume:
            path = self.place(volume["hostPath"]["path"])
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(mode=0o755, exist_ok=True)
            assert path.is_dir()
            return path
        path = self.folder / "volumes" / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            config = one(documents, "ConfigMap")
            assert config["metadata"]["name"] == volume["configMap"]["name"]
            for name, text in config["data"].items():
                (path / name).write_text(text)
        else:
            assert "emptyDir" in volume
            path.chmod(0o777)
        return path


@dataclass(frozen=True, slots=True)
class Server:
    """A running container; `network` names its network namespace, `log` is what it writes."""

    network: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The container's first process, as the host numbers it."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def proc(self) -> dict[str, str]:
        """/proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def get(self, path: str, accept: str = "text/plain") -> str:
        """As the kubelet and Prometheus ask, from the pod's network. OSError: there is no good answer."""
        command = ["ip", "netns", "exec", self.network, sys.executable, "-IS", "-c", _ASK]
        url = f"http://127.0.0.1:{self.port}{path}"
        done = subprocess.run([*command, url, accept], capture_output=True, text=True, timeout=machine.COMMAND_S)
        if done.returncode:
            raise OSError(f"{url}: {done.stderr[-500:]}")
        return done.stdout

    def samples(self) -> dict[str, float]:
        """By name and labels."""
        lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def kill(self) -> None:
        """Without a chance to say good-bye. Its container goes with it."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(machine.STOP_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def node(root: Path, deb: Path, dockerfile: Path) -> Iterator[Node]:
    """A node with an image that the Dockerfile's steps make of `root` and `deb`. Nothing of it is left afterwards."""
    name = f"bpfmk{os.getpid()}"
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-")))
        image, layers = folder / "image", folder / "layers"
        for path in (image, layers / "upper", layers / "work", folder / "bpf", folder / "run"):
            path.mkdir(parents=True)
        overlay = f"lowerdir={root},upperdir={layers / 'upper'},workdir={layers / 'work'}"
        undo.callback(_forget, name)
        _run("mount", "-t", "overlay", "-o", overlay, name, str(image))
        undo.callback(_run, "umount", str(image))
        _run("mount", "-t", "bpf", "-o", "mode=0700", name, str(folder / "bpf"))
        undo.callback(_run, "umount", str(folder / "bpf"))
        _run("ip", "netns", "add", name)
        undo.callback(_run, "ip", "netns", "delete", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        groups = machine._groups(name)
        undo.callback(machine._remove_groups, groups)
        folders = {"/sys/fs/bpf": folder / "bpf", "/run": folder / "run", "/sys/fs/cgroup": Path("/sys/fs/cgroup")}
        made = Node(name, image, folder, folders, groups)
        _make(made, deb, dockerfile.read_text())
        yield made


def _make(node: Node, deb: Path, dockerfile: str) -> None:
    """COPY and RUN. The root below stands for the base image: its apt has what it needs, and it has a systemd."""
    lines = re.sub(r"\\\n", " ", re.sub("^#.*\n", "", dockerfile, flags=re.MULTILINE)).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line]
    (node.image / "etc/dpkg/dpkg.cfg.d/speedup").write_text("force-unsafe-io\n")  # as Debian's images have it
    for word, rest in steps:
        if word == "COPY":
            pattern, target = rest.split()
            assert deb.match(pattern), f"{deb.name} is not what the Dockerfile copies: {pattern}"
            shutil.copy(deb, node.image / target.lstrip("/"))
        elif word == "RUN":
            for instead, what in (("true", "apt-get update"), ("", "systemd-standalone-sysusers ")):
                assert what in rest
                rest = rest.replace(what, instead)
            rest = rest.replace("/var/lib/apt/lists/*", "")  # of the layer below
            done = subprocess.run(
                [
                    "systemd-nspawn", "--quiet", f"--directory={node.image}", f"--machine={node.name}", "--keep-unit",
                    "--register=no", "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
                    "--private-network", "sh", "-ec", rest,
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=machine.COMMAND_S, env=_environment() | {"DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
    (node.image / "host/sys/fs/cgroup").mkdir(parents=True)  # a runtime makes such folders before it closes the root


def _forget(name: str) -> None:
    """The folder that nspawn makes for each machine and leaves."""
    for path in machine._NSPAWN_STATE.glob(f"*/{name}"):
        path.rmdir()


def _pod(documents: list[Document]) -> Document:
    found: Document = one(documents, "DaemonSet")["spec"]["template"]["spec"]
    return found


def _environment() -> dict[str, str]:
    """A container of Kubernetes has cgroup v2 and no /tmp of its own."""
    return os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}


def _capabilities() -> list[str]:
    """Every capability that systemd knows."""
    done = subprocess.run(["systemd-analyze", "capability"], capture_output=True, text=True, check=True)
    return [line.split()[0].upper() for line in done.stdout.splitlines()[1:] if line.startswith("cap_")]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=machine.COMMAND_S)
