# SPDX-License-Identifier: Apache-2.0
"""The guest's own tests as reports of this run, and how long each guest took."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vm.junit import Case

Note = Callable[[str], None]
Report = Callable[[str, Case], None]
_NOTES = pytest.StashKey[list[str]]()


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


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Note:
    """Keeps a line for the end of the run."""
    return request.config.stash.setdefault(_NOTES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(_NOTES, []):
        terminalreporter.write_line(line)
