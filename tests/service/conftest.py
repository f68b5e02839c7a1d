# SPDX-License-Identifier: Apache-2.0
"""The package and the machine that the tests of this folder share."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.service import machine, root
from tests.service.machine import Machine
from tests.vm.images import CannotBuildError

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tools(lacks: Callable[[str], NoReturn]) -> None:
    missing = root.missing_tools()
    if missing:
        lacks(f"{', '.join(missing)} not installed; apt install {' '.join(missing)}")
    if os.geteuid() != 0:
        lacks("machines are booted by root; use sudo")


@pytest.fixture(scope="session")
def packages(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """A folder with the package, and in `next` one of a higher version."""
    folder = tmp_path_factory.mktemp("packages")
    build = PROJECT / "packaging/build-deb"
    for arguments in (["-o", str(folder)], ["-o", str(folder / "next"), "-V", "99.0"]):
        done = subprocess.run([build, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def deb(packages: Path) -> Path:
    (found,) = packages.glob("*.deb")
    return found


@pytest.fixture(scope="session")
def computer(packages: Path, lacks: Callable[[str], NoReturn]) -> Iterator[Machine]:
    """A machine without the package."""
    try:
        tree = root.build()
    except CannotBuildError as error:
        lacks(f"no root file system: {error}")
    with machine.booted(tree, packages) as one:
        one.write("/etc/apt/apt.conf.d/90test", 'APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "false";\n')
        yield one
    assert machine.leftovers(one.name) == []


def blocks(language: str) -> list[str]:
    """The code blocks of one language in the operator's manual, without its section on alerts."""
    text = (PROJECT / "docs/operating.md").read_text()
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    own = "".join(section for section in sections if not section.startswith("## Alerts"))
    return re.findall(rf"^```{language}\n(.*?)^```$", own, flags=re.MULTILINE | re.DOTALL)
