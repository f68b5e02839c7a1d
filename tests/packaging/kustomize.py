# SPDX-License-Identifier: Apache-2.0
"""`kustomize build`, as far as packaging/k8s uses it; what it does not know is an error.

resources, namespace, configMapGenerator (from files), images and patches (RFC 6902: add, replace, remove).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
_STEPS = ("resources", "configMapGenerator", "namespace", "images", "patches")


def build(folder: Path) -> list[Document]:
    """The documents that `kubectl apply -k` would send, in no particular order."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert wanted.pop("apiVersion") == "kustomize.config.k8s.io/v1beta1"
    assert wanted.pop("kind") == "Kustomization"
    assert set(wanted) <= set(_STEPS), f"{folder}: {set(wanted) - set(_STEPS)} is not known here"
    found: list[Document] = []
    for resource in wanted.get("resources", []):
        path = folder / resource
        found += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for generator in wanted.get("configMapGenerator", []):
        _add_config_map(found, folder, **generator)
    if namespace := wanted.get("namespace"):
        for document in found:
            if document["kind"] != "Namespace":
                document["metadata"]["namespace"] = namespace
    for image in wanted.get("images", []):
        _replace_images(found, **image)
    for patch in wanted.get("patches", []):
        _patch(found, **patch)
    return found


def one(documents: list[Document], kind: str) -> Document:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def _add_config_map(documents: list[Document], folder: Path, name: str, files: list[str]) -> None:
    data = {Path(file).name: (folder / file).read_text() for file in files}
    full = f"{name}-{hashlib.sha256(repr(data).encode()).hexdigest()[:10]}"  # kustomize hashes something else
    for document in documents:
        for volume in _pod(document).get("volumes", []):
            if volume.get("configMap", {}).get("name") == name:
                volume["configMap"]["name"] = full
    documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": full}, "data": data})


def _replace_images(documents: list[Document], name: str, newName: str, newTag: str) -> None:  # noqa: N803
    for document in documents:
        pod = _pod(document)
        for container in pod.get("initContainers", []) + pod.get("containers", []):
            if container["image"] == name:
                container["image"] = f"{newName}:{newTag}"


def _pod(document: Document) -> Document:
    """What a workload says of its pods; nothing for other kinds."""
    spec: Document = document.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def _patch(documents: list[Document], target: Document, patch: str) -> None:
    (document,) = (
        one for one in documents if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])
    )
    for step in yaml.safe_load(patch):
        *parents, last = step["path"].lstrip("/").split("/")
        place: Any = document
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if isinstance(place, list):
            assert (step["op"], last) == ("add", "-"), step
            place.append(step["value"])
        elif step["op"] == "remove":
            del place[last]
        else:
            assert step["op"] == "add" or (step["op"] == "replace" and last in place), step
            place[last] = step["value"]
