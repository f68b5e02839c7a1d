# SPDX-License-Identifier: Apache-2.0
"""The manifests of packaging/k8s, as far as they run without a container engine; see tests/service/pod.py.

In this order, as in the life of a node: load, serve, replace the pod, change the configuration, unload.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

import collectors
from daemon import cgroups
from tests.packaging.kustomize import Document, build, one
from tests.service import machine, pod, root
from tests.service.machine import remove_group, wait_for
from tests.service.pod import Node, Server
from tests.service.test_service import WAITS, started, up
from tests.vm.images import CannotBuildError

pytestmark = pytest.mark.service

FOLDER = Path(__file__).resolve().parents[2] / "packaging/k8s"
FILTER = FOLDER / "overlays/seccomp/server.json"
UID, CONTAINER = "1b2c3d4e-0123-4567-89ab-0123456789ab", "c0ffee12" * 8
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
USER, CAP_BPF = "10435", 1 << 39


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return build(FOLDER / "base")


@pytest.fixture(scope="module")
def node(tools: None, deb: Path, lacks: Callable[[str], NoReturn]) -> Iterator[Node]:  # noqa: ARG001
    try:
        tree = root.build()
    except CannotBuildError as error:
        lacks(f"no root file system: {error}")
    with pod.node(tree, deb, FOLDER / "Dockerfile") as made:
        yield made
    assert machine.leftovers(made.name) == []


@pytest.fixture(scope="module")
def loaded(node: Node, documents: list[Document]) -> Node:
    """With the programs on it."""
    done = node.init(documents)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" loaded ") == len(collectors.ALL)
    return node


def all_up(server: Server) -> dict[str, float]:
    """The samples of a scrape with all six collectors up."""
    samples = server.samples()
    found = up(samples)
    assert set(found) == set(collectors.BY_NAME)
    assert set(found.values()) == {1.0}, server.get("/status")
    return samples


def bounds(server: Server) -> dict[str, int]:
    status = server.proc()
    return {kind: int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}


@pytest.fixture
def victims_groups(node: Node) -> Iterator[tuple[str, list[Path]]]:
    """A container's cgroup with little memory, as a kubelet names it: its path, and where a process joins it."""
    name = f"{node.name}-kubepods"
    path = f"/{name}.slice/{name}-pod{UID.replace('-', '_')}.slice/cri-containerd-{CONTAINER}.scope"
    top = cgroups.mount_point()
    assert top, "this test wants cgroup v2"
    old = Path("/sys/fs/cgroup/memory")
    with ExitStack() as undo:
        group = top
        for part in path.strip("/").split("/"):
            if not old.is_dir():
                (group / "cgroup.subtree_control").write_text("+memory")
            group /= part
            group.mkdir()
            undo.callback(remove_group, group)
        joined = [group]
        limit = group / "memory.max"
        if old.is_dir():
            limited = old / node.name
            limited.mkdir()
            undo.callback(remove_group, limited)
            joined.append(limited)
            limit = limited / "memory.limit_in_bytes"
        limit.write_text(str(48 << 20))
        yield path, joined


def kill_for_memory(groups: list[Path]) -> int:
    """A process of these groups that asks for too much; its id."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read(1); b'x' * (1 << 30)"]
    victim = subprocess.Popen(command, stdin=subprocess.PIPE)
    for group in groups:
        (group / "cgroup.procs").write_text(str(victim.pid))
    victim.communicate(b"x")
    assert victim.returncode == -9
    return victim.pid


def test_a_pod_does_not_start_where_nothing_loads(node: Node) -> None:
    documents = build(FOLDER / "base")
    (container,) = one(documents, "DaemonSet")["spec"]["template"]["spec"]["initContainers"]
    container["securityContext"]["capabilities"]["add"].remove("CHOWN")
    done = node.init(documents)
    assert done.returncode == 1
    assert "/run/bpf/bpfmetricsd cannot be made" in done.stdout


def test_the_init_container_loads_and_the_pins_are_the_servers_alone(loaded: Node) -> None:
    folder = loaded.place("/sys/fs/bpf/bpfmetricsd-k8s") / "bpfmetricsd"
    assert {path.name for path in folder.iterdir()} == set(collectors.BY_NAME)
    found = {(oct(path.stat().st_mode & 0o777), path.stat().st_uid, path.stat().st_gid) for path in folder.rglob("*")}
    assert found == {("0o750", 0, int(USER)), ("0o640", 0, int(USER)), ("0o660", 0, int(USER))}


def test_the_server_shows_all_without_any_capability(loaded: Node, documents: list[Document]) -> None:
    with loaded.server(documents) as server:
        all_up(server)
        assert (server.get("/-/ready"), server.get("/-/healthy")) == ("ready\n", "healthy\n")
        assert set(bounds(server).values()) == {0}
        status = server.proc()
        assert {*status["Uid"].split(), *status["Gid"].split()} == {USER}
        assert status["NoNewPrivs"] == "1"
        mounts = [line.split() for line in Path(f"/proc/{server.pid}/mountinfo").read_text().splitlines()]
        wanted = {"/", "/run/bpf", "/run/bpfmetricsd", "/etc/bpfmetricsd", "/host/sys/fs/cgroup"}
        assert {fields[4]: fields[5].split(",")[0] for fields in mounts if fields[4] in wanted} == dict.fromkeys(
            wanted, "ro"
        )


def test_an_event_in_a_pod_names_it_and_counts_outlive_the_pod(
    loaded: Node, documents: list[Document], victims_groups: tuple[str, list[Path]]
) -> None:
    path, groups = victims_groups
    key = f'bpf_oom_kills_total{{scope="memcg",cgroup="{path}"}}'
    with loaded.server(documents) as server:
        pid = kill_for_memory(groups)
        wait_for(lambda: server.samples().get(key) == 1, key)
        page = server.get("/metrics", OPENMETRICS)
        (line,) = (line for line in page.splitlines() if line.startswith(key))
        assert f'pid="{pid}"' in line
        assert line.split("# ")[1].split("}")[0].endswith(f'container="{CONTAINER[:12]}",pod="{UID}"')
        wait_for(lambda: f"BPF_PID={pid} " in server.said(), "the event in the container's log")
        (event,) = (line for line in server.said().splitlines() if f"BPF_PID={pid} " in line)
        assert f" BPF_CONTAINER={CONTAINER[:12]} BPF_POD={UID} " in event
        before = all_up(server)
        server.kill()
    again = loaded.init(documents)  # a new pod
    assert again.returncode == 0, again.stdout
    assert again.stdout.count(" kept ") == len(collectors.ALL)
    with loaded.server(documents) as server:
        after = all_up(server)
        assert started(after) == started(before)
        assert after[key] == 1
        assert after[WAITS] > before[WAITS] > 0


def test_the_server_finds_the_cgroups_of_the_node(
    loaded: Node, documents: list[Document], victims_groups: tuple[str, list[Path]]
) -> None:
    """An id becomes a path through the node's tree, which the container has beside its own group's."""
    path, groups = victims_groups
    (config,) = (document for document in documents if document["kind"] == "ConfigMap")
    changed = [
        document
        | {"data": {name: text.replace("{by: none}", "{by: cgroup}", 1) for name, text in config["data"].items()}}
        if document is config
        else document
        for document in documents
    ]
    done = loaded.init(changed)
    assert done.returncode == 0, done.stdout
    kill_for_memory(groups)  # it waits for a CPU before
    with loaded.server(changed) as server:
        wait_for(lambda: server.samples().get(f'{WAITS}{{cgroup="{path}"}}', 0) > 0, path)
    assert loaded.init(documents).returncode == 0


def test_a_collector_that_does_not_load_keeps_no_pod_from_starting(loaded: Node, documents: list[Document]) -> None:
    source = loaded.image / "usr/lib/bpfmetricsd/bpf/cachestat.bpf.c"
    text = source.read_text()
    source.write_text(text + "#error broken by a test\n")
    try:
        done = loaded.init(documents)
        assert done.returncode == 0
        assert "broken by a test" in done.stdout
        with loaded.server(documents) as server:
            assert len(up(server.samples())) == len(collectors.ALL)
    finally:
        source.write_text(text)
    assert loaded.init(documents).returncode == 0


def test_a_faulty_configuration_keeps_the_pod_from_starting(loaded: Node, documents: list[Document]) -> None:
    faulty = [
        document | ({"data": dict.fromkeys(document["data"], "intervall: 5s\n")} if "data" in document else {})
        for document in documents
    ]
    done = loaded.init(faulty)
    assert done.returncode == 2
    assert "intervall" in done.stdout


def test_the_server_lives_under_its_own_filter(loaded: Node) -> None:
    """The profile of overlays/seccomp, put in force by libseccomp as a runtime does it."""
    inside = loaded.image / "opt"
    (inside / "server.json").write_text(FILTER.read_text())
    (inside / "confine.py").write_text((Path(__file__).parent / "confine.py").read_text())
    confine = ("/usr/bin/python3", "-IS", "/opt/confine.py", "/opt/server.json")
    with loaded.server(build(FOLDER / "overlays/seccomp"), *confine) as server:
        page = all_up(server)
        assert int(server.proc()["Seccomp_filters"]) >= 2
        assert page[WAITS] > 0
        assert 'comm="' in server.get("/metrics", OPENMETRICS)
        assert server.get("/-/ready") == "ready\n"


def test_before_5_19_the_server_becomes_an_ordinary_user(loaded: Node) -> None:
    """On this kernel, where it needs no CAP_BPF, or before 5.19, where it keeps that one."""
    older = build(FOLDER / "overlays/kernel-before-5.19")
    done = loaded.init(older)
    assert done.returncode == 0, done.stdout
    with loaded.server(older) as server:
        all_up(server)
        kept = bounds(server)
        assert kept["Eff"] == kept["Prm"] == kept["Bnd"]
        assert kept["Eff"] in (0, CAP_BPF)
        assert kept["Inh"] == kept["Amb"] == 0
        assert server.proc()["Uid"].split() == [USER] * 4


def test_unload_leaves_nothing_on_the_node(loaded: Node) -> None:
    done = loaded.init(build(FOLDER / "overlays/unload"))
    assert done.returncode == 0, done.stdout
    assert "unloaded" in done.stdout
    for path in ("/sys/fs/bpf/bpfmetricsd-k8s", "/run/bpfmetricsd-k8s"):
        assert list(loaded.place(path).iterdir()) == []
