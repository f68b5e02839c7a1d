# SPDX-License-Identifier: Apache-2.0
"""What all levels share: a test that needs what this machine lacks says so, and in CI that is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import accuracy

REQUIRE = "BPFMETRICSD_REQUIRE"
Lacks = Callable[[str], NoReturn]


@pytest.fixture(scope="session")
def lacks() -> Lacks:
    """Call it with what the machine lacks and what to install."""

    def say(what: str) -> NoReturn:
        pytest.skip(what)

    return say


@pytest.hookimpl(hookwrapper=True)  # the newer wrapper=True is not in Debian 12's pytest
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """A skip is a failure where everything should be there, but for what "this kernel" cannot do."""
    report = (yield).get_result()
    if report.skipped and os.environ.get(REQUIRE) == "1" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith("this kernel"):
            report.outcome = "failed"
            report.longrepr = f"skipped, which {REQUIRE}=1 makes a failure: {reason}"


def pytest_sessionfinish() -> None:
    accuracy.leave()


def _things() -> dict[str, set[str]]:
    """What tests make on a machine: pins, loop devices, network namespaces, mounts, cgroups."""

    def names(folder: str, pattern: str = "*") -> set[str]:
        try:
            return {str(path) for path in Path(folder).glob(pattern)}
        except OSError:
            return set()

    loops = {str(path) for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {
        "pins": names("/sys/fs/bpf"),
        "loop devices": loops,
        "network namespaces": names("/run/netns"),
        "mounts": mounts - {"/run/netns"},  # ip(8) makes it for the first namespace, and keeps it
        "cgroups": names("/sys/fs/cgroup/memory") | names("/sys/fs/cgroup/unified") | names("/sys/fs/cgroup"),
    }


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """In CI, where nobody else works on the machine, what a test leaves behind is a failure."""
    before = _things()
    yield
    if os.environ.get(REQUIRE) != "1":
        return
    left = {kind: sorted(found - before[kind]) for kind, found in _things().items() if found - before[kind]}
    assert not left, f"tests left behind: {left}"
