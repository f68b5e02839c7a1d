# SPDX-License-Identifier: Apache-2.0
"""The package before anybody installs it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.service.conftest import PROJECT, SUITES
from tests.service.root import CONTROL, depends

pytestmark = [pytest.mark.service, SUITES]

SHARED = {
    "config/rules/*.yaml": "usr/share/bpfmetricsd/rules",
    "grafana/dashboards/*": "usr/share/bpfmetricsd/dashboards",
    "docs/*.md": "usr/share/doc/bpfmetricsd/docs",
}
INSTALLED = {
    "bpf/**/*.[ch]": "usr/lib/bpfmetricsd/bpf", "collectors/*.py": "usr/lib/bpfmetricsd/collectors",
    "daemon/*.py": "usr/lib/bpfmetricsd/daemon", **SHARED,
}  # fmt: skip


def test_lintian_has_no_warnings(deb: Path, lacks: Callable[[str], NoReturn]) -> None:
    if shutil.which("lintian") is None:
        lacks("lintian is not installed; apt install lintian")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", deb], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_it_holds_every_file_of_the_program_and_nothing_else(deb: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path], check=True)
    for pattern, folder in INSTALLED.items():
        base = PROJECT / pattern.split("/*")[0]
        expected = {path.relative_to(base) for path in PROJECT.glob(pattern)}
        assert expected
        found = {path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert found == expected


def test_it_depends_on_what_the_program_imports(deb: Path) -> None:
    said = subprocess.run(["dpkg-deb", "-f", deb, "Depends"], check=True, capture_output=True, text=True).stdout
    needed = {
        "python3-bpfcc",
        "libbpf1",
        "python3-prometheus-client",
        "python3-yaml",
        "python3-systemd",
        "python3-uvicorn",
    }
    assert needed <= {word.strip() for word in said.split(",")}
    assert set(depends(CONTROL.read_text())) == {*needed, "python3", "python3-bcrypt"}
