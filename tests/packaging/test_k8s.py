# SPDX-License-Identifier: Apache-2.0
"""The manifests of packaging/k8s: valid by Kubernetes' own schemas, and of one mind with the rest of the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import collectors
from daemon import __version__
from daemon.config import Config, parse
from tests.packaging.kustomize import Document, build, one

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="packaging/bootstrap test installs it")
jsonschema = pytest.importorskip("jsonschema", reason="kubernetes-validate depends on it")

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "packaging/k8s"
OVERLAYS = [path.parent for path in sorted(FOLDER.glob("overlays/*/kustomization.yaml"))]
EVERY = [FOLDER / "base", *OVERLAYS]
VERSIONS = ["1.25", kubernetes_validate.latest_version()]  # the oldest that the validator has, and the newest
PORT = 10435


def pod(folder: Path = FOLDER / "base") -> Document:
    found: Document = one(build(folder), "DaemonSet")["spec"]["template"]["spec"]
    return found


def loader(folder: Path = FOLDER / "base") -> Document:
    (found,) = pod(folder)["initContainers"]
    return found


def server(folder: Path = FOLDER / "base") -> Document:
    (found,) = pod(folder)["containers"]
    return found


def config() -> Config:
    (text,) = one(build(FOLDER / "base"), "ConfigMap")["data"].values()
    return parse(text, "bpfmetricsd.yaml", {collector.name: collector.options for collector in collectors.ALL})


def mounts(container: Document) -> dict[str, Document]:
    return {mount["mountPath"]: mount for mount in container["volumeMounts"]}


def test_every_folder_is_looked_at() -> None:
    assert [path.name for path in OVERLAYS] == sorted(path.name for path in (FOLDER / "overlays").iterdir())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", EVERY, ids=lambda folder: folder.name)
def test_objects_are_valid(folder: Path, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is a fault. The PodMonitor is none of its own kinds."""
    documents = build(folder)
    kinds = sorted(document["kind"] for document in documents)
    assert kinds == ["ConfigMap", "DaemonSet", "Namespace", "PodMonitor", "ServiceAccount"]
    for document in documents:
        if document["kind"] != "PodMonitor":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"), [(["spec", "template", "spec", "hostPid"], True), (["spec", "updateStrategy"], "RollingUpdate")]
)
def test_the_validator_sees_faults(path: list[str], value: Any) -> None:
    document = one(build(FOLDER / "base"), "DaemonSet")
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def strict(schema: Any) -> Any:
    """The schema, where a field that it does not know is a fault; Kubernetes would drop the field."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return closed | {name: strict(part) for name, part in schema.items()}


def pod_monitor_faults(document: Document) -> list[str]:
    """By the schema of the operator's CustomResourceDefinition."""
    schema = json.loads((Path(__file__).parent / "podmonitor.schema.json").read_text())
    schema["properties"]["metadata"]["additionalProperties"] = True
    found = jsonschema.Draft202012Validator(strict(schema)).iter_errors(document)
    return [".".join(map(str, error.path)) + f": {error.message}" for error in found]


def test_pod_monitor_is_valid() -> None:
    assert pod_monitor_faults(one(build(FOLDER / "base"), "PodMonitor")) == []


def test_the_schema_of_pod_monitors_sees_faults() -> None:
    document = one(build(FOLDER / "base"), "PodMonitor")
    endpoint = document["spec"]["podMetricsEndpoints"][0]
    endpoint |= {"intervall": "15s", "interval": "15 seconds"}
    del document["spec"]["selector"]
    assert len(pod_monitor_faults(document)) == 3


def test_pod_monitor_finds_the_pods() -> None:
    documents = build(FOLDER / "base")
    daemonset, monitor = one(documents, "DaemonSet"), one(documents, "PodMonitor")
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert re.fullmatch("(.+/)?bpfmetricsd", labels[monitor["spec"]["jobLabel"]])  # what the rules expect
    (port,) = (port["name"] for port in server()["ports"])
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == [port]
    assert {server()[f"{kind}Probe"]["httpGet"]["port"] for kind in ("readiness", "liveness")} == {port}


def test_the_loader_has_the_capabilities_of_its_unit() -> None:
    unit = (PROJECT / "packaging/systemd/bpfmetricsd-load.service").read_text()
    (line,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    capabilities = loader()["securityContext"]["capabilities"]
    assert [f"CAP_{name}" for name in capabilities["add"]] == line.split()
    assert capabilities["drop"] == ["ALL"]


@pytest.mark.parametrize("folder", EVERY, ids=lambda folder: folder.name)
def test_no_container_is_privileged_or_may_gain_or_write(folder: Path) -> None:
    spec = pod(folder)
    assert not {"hostPID", "hostNetwork", "hostIPC"} & set(spec)
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["initContainers"], *spec["containers"]):
        context = container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert "privileged" not in context


def test_the_server_has_no_capability_and_writes_nowhere() -> None:
    context = server()["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert all(mount["readOnly"] for mount in server()["volumeMounts"])


def test_before_5_19_the_server_starts_as_root_with_what_its_drop_needs() -> None:
    context = server(FOLDER / "overlays/kernel-before-5.19")["securityContext"]
    assert context["runAsUser"] == 0
    assert context["capabilities"]["add"] == ["BPF", "SETUID", "SETGID", "SETPCAP"]


def test_configuration_and_mounts_agree() -> None:
    found = config()
    assert set(found.collectors) == set(collectors.BY_NAME)
    assert [(address.host, address.port) for address in found.server.listen] == [("", PORT)]
    assert server()["ports"][0]["containerPort"] == PORT
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    for container in (loader(), server()):
        mounted = mounts(container)
        assert volumes[mounted[str(found.bpffs.parent)]["name"]]["hostPath"]["path"].startswith("/sys/fs/bpf/")
        assert volumes[mounted[str(found.state)]["name"]]["hostPath"]["path"].startswith("/run/")
        assert volumes[mounted["/etc/bpfmetricsd"]["name"]]["configMap"]["name"].startswith("bpfmetricsd-")
    assert f"ls -d {found.bpffs}/*/maps" in loader()["args"][0]


def test_the_node_and_a_package_on_it_share_no_folder() -> None:
    """Each loader takes away what it does not know from its folder."""
    shipped = Config({})
    paths = {Path(volume["hostPath"]["path"]) for volume in pod()["volumes"] if "hostPath" in volume}
    assert not paths & {shipped.bpffs, shipped.state}


def test_what_a_mount_names_is_a_volume() -> None:
    volumes = {volume["name"] for volume in pod()["volumes"]}
    used = {mount["name"] for container in (loader(), server()) for mount in container["volumeMounts"]}
    assert used == volumes


def test_image_user_and_port_agree() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    user = server()["securityContext"]["runAsUser"]
    assert f"groupadd --system --gid {user} bpfmetricsd" in dockerfile
    assert f"useradd --system --uid {user} --gid bpfmetricsd" in dockerfile
    assert f"USER {user}:{server()['securityContext']['runAsGroup']}" in dockerfile
    assert f"EXPOSE {PORT}" in dockerfile
    assert server()["image"].rpartition(":")[2] == loader()["image"].rpartition(":")[2] == __version__


def test_the_filter_allows_bpf_and_not_what_a_server_never_needs() -> None:
    overlay = FOLDER / "overlays/seccomp"
    profile = json.loads((overlay / "server.json").read_text())
    (allowed,) = (set(rule["names"]) for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW")
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {"bpf", "execve", "accept4", "epoll_wait"} <= allowed
    assert not {"mount", "ptrace", "unshare", "setns", "init_module", "perf_event_open", "keyctl", "setuid"} & allowed
    wanted = server(overlay)["securityContext"]["seccompProfile"]
    assert wanted == {"type": "Localhost", "localhostProfile": "bpfmetricsd/server.json"}


def test_readme_names_every_overlay_and_every_folder_on_the_node() -> None:
    text = (FOLDER / "README.md").read_text()
    for overlay in OVERLAYS:
        assert f"overlays/{overlay.name}" in text
    for volume in pod()["volumes"]:
        if "hostPath" in volume:
            assert volume["hostPath"]["path"] in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_files_say_their_licence_and_are_read_once(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(list(yaml.safe_load_all(text))) == 1
