# SPDX-License-Identifier: Apache-2.0
"""The package and the machine that the tests of this folder share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.service import machine, root
from tests.service.machine import Machine
from tests.vm.images import CannotBuildError

PROJECT = Path(__file__).resolve().parents[2]
CHOICE = "BPFMETRICSD_SUITES"  # by name, with commas; all where it is not set
NEXT, AFTER_NEXT = "99.0", "100.0"
CHANGED = "cachestat"  # the collector that has other maps in the version AFTER_NEXT


def _suites() -> pytest.MarkDecorator:
    """Runs a test on each suite. Debian 12's is part of the tests that everybody runs."""
    every = (root.SUITE, *root.LATER)
    wanted = [name.strip() for name in os.environ.get(CHOICE, "").split(",") if name.strip()] or every
    assert set(wanted) <= set(every), f"{CHOICE}: known are {', '.join(every)}"
    marks = {name: [pytest.mark.vm] if name in root.LATER else [] for name in wanted}
    return pytest.mark.parametrize(
        "suite", [pytest.param(name, marks=marks[name]) for name in wanted], indirect=True, scope="session"
    )


SUITES = _suites()


@pytest.fixture(scope="session")
def tools(lacks: Callable[[str], NoReturn]) -> None:
    missing = root.missing_tools()
    if missing:
        lacks(f"{', '.join(missing)} not installed; apt install {' '.join(missing)}")
    if os.geteuid() != 0:
        lacks("machines are booted by root; use sudo")


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> str:
    """Debian's name for its release: the one of `SUITES` that a test is run with, or Debian 12."""
    return str(getattr(request, "param", root.SUITE))


@pytest.fixture(scope="session")
def tree(tools: None, suite: str, lacks: Callable[[str], NoReturn]) -> Path:  # noqa: ARG001
    """A root file system of the suite, without the package."""
    try:
        return root.build(suite)
    except CannotBuildError as error:
        lacks(f"no root file system: {error}")


@pytest.fixture(scope="session")
def packages(suite: str, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package; in `next` one of a higher version, in `layout` one whose maps are different, too."""
    folder = tmp_path_factory.mktemp("packages")
    folder.chmod(0o755)
    root.build_packages(suite, tree, folder, NEXT)
    _other_layout(folder)
    return folder


def _other_layout(packages: Path) -> None:
    """The package of the higher version with one map more for one collector."""
    (deb,) = (packages / "next").glob("*.deb")
    unpacked, made = packages / "unpacked", packages / "layout"
    subprocess.run(["dpkg-deb", "-R", deb, unpacked], check=True)
    for path, old, new in (
        ("DEBIAN/control", f"Version: {NEXT}", f"Version: {AFTER_NEXT}"),
        ("usr/lib/bpfmetricsd/daemon/__init__.py", f'"{NEXT}"', f'"{AFTER_NEXT}"'),
        (f"usr/lib/bpfmetricsd/bpf/{CHANGED}.bpf.c", '#include "program.h"\n', "\\g<0>BPF_ARRAY(one_more, u64, 1);\n"),
    ):
        text, found = re.subn(re.escape(old), new, (unpacked / path).read_text())
        assert found == 1, f"{path} has no {old}"
        (unpacked / path).write_text(text)
    made.mkdir()
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", unpacked, made], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(unpacked)


@pytest.fixture(scope="session")
def deb(packages: Path) -> Path:
    (found,) = packages.glob("*.deb")
    return found


@pytest.fixture(scope="session")
def computer(tree: Path, packages: Path) -> Iterator[Machine]:
    """A machine without the package."""
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
