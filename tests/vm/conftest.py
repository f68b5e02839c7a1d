# SPDX-License-Identifier: Apache-2.0
"""Guest by guest: an image, one boot for all that is asked of it, and the guest's own tests as reports of this run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

BOOTS = pytest.StashKey[list[str]]()


@dataclass(frozen=True, slots=True)
class Case:
    """One test of the guest. `outcome` is passed, failed or skipped; `text` says why."""

    name: str
    outcome: str
    text: str
    seconds: float


def cases(junit: str) -> list[Case]:
    """What a JUnit file of pytest (family xunit1) tells."""
    found = []
    for element in ElementTree.fromstring(junit).iter("testcase"):
        outcome, text = "passed", ""
        for child in element:
            if child.tag in ("failure", "error"):
                outcome, text = "failed", child.text or child.get("message", "")
            elif child.tag == "skipped":
                outcome, text = "skipped", child.get("message", "") or child.text or ""
        file = element.get("file") or element.get("classname", "")
        found.append(Case(f"{file}::{element.get('name')}", outcome, text, float(element.get("time", 0))))
    return found


Report = Callable[[str, Case], None]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Gives a guest's test to this run as if it had run here: it is counted, shown and summed up with the others."""

    def do(guest: str, case: Case) -> None:
        file = case.name.split("::")[0]
        longrepr = {"passed": None, "failed": case.text, "skipped": (file, 0, f"[{guest}] {case.text}")}[case.outcome]
        request.node.ihook.pytest_runtest_logreport(
            report=pytest.TestReport(
                nodeid=f"{case.name}[{guest}]", location=(file, 0, f"{case.name}[{guest}]"), keywords={},
                outcome=case.outcome, longrepr=longrepr, when="call", duration=case.seconds,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    return do


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOOTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None] | None:
    for line in terminalreporter.config.stash.get(BOOTS, []):
        terminalreporter.write_line(line)
    return None
