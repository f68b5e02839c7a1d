# SPDX-License-Identifier: Apache-2.0
"""The kernel tests on other kernels: each guest loads every collector, and runs `pytest -m kernel` by itself.

What is about our own files and processes, and not about the kernel, is left out: an emulated machine is slow.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import accuracy
from tests.vm import guest, images
from tests.vm.guest import RESULTS, Command, Result
from tests.vm.images import CannotBuildError, Guest
from tests.vm.junit import Case, cases

pytestmark = pytest.mark.vm

CHOICE = "BPFMETRICSD_VM"  # guests by name, with commas
TESTS = "BPFMETRICSD_VM_TESTS"  # arguments for the guest's pytest
AT_ONCE = 2  # on two CPUs; a guest waits for a part of its time
HOOKS = Path(__file__).with_name("hooks.txt")

_PYTHON = "/usr/bin/python3"
_LOADS = Command("loads", (_PYTHON, "-m", "tests.vm.loads", f"{RESULTS}/loads.json"))
_NOT_THE_KERNELS = (
    *(f"--ignore=tests/kernel/test_{name}.py" for name in ("loader", "page", "second_opinion", "variants")),
    *(f"--deselect=tests/kernel/test_{name}" for name in (
        "oomkill.py::test_odd_names",
        "oomkill.py::test_the_name_of_a_container",
        "oomkill.py::test_a_deep_path_loses_its_outermost_parts",
        "process.py::test_no_count_is_lost_while_the_server_is_dead",
        "process.py::test_oom_kill_is_told_after_the_restart_with_its_own_time",
        "process.py::test_terminated_it_leaves_the_programs_counting",
        "process.py::test_unload_on_exit_leaves_nothing",
        "process.py::test_reload_reads_the_configuration_again",
    )),
)  # fmt: skip


def _pytest(name: str, *more: str) -> Command:
    wanted = shlex.split(os.environ.get(TESTS, "")) or ("tests/kernel", *_NOT_THE_KERNELS)
    return Command(name, (
        *("env", "BPFMETRICSD_REQUIRE=1", f"{accuracy.FOLDER}={RESULTS}/{name}"),
        *(_PYTHON, "-m", "pytest", "-v", "-m", "kernel", "-o", "cache_dir=/run/pytest"),
        *(f"--junitxml={RESULTS}/{name}.xml", "-o", "junit_family=xunit1"),
        *("-o", f"faulthandler_timeout={guest.SILENCE_S // 2}", *wanted, *more),
    ))  # fmt: skip


def _keep_accuracy(result: Result) -> None:
    """The guest's comparisons with its kernel's account, where the host collects them."""
    if os.environ.get(accuracy.FOLDER):
        folder = Path(os.environ[accuracy.FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in result.files.items():
            if name.startswith("tests/"):  # and not what was asked again
                (folder / Path(name).name).write_text(text)


def _boot(which: Guest) -> Result:
    # Clocks jump in an emulated machine on a busy host, so what failed is asked once more, alone.
    again = _pytest("again", "--last-failed", "--last-failed-no-failures=none")
    result = guest.run(images.build(which), [_LOADS, _pytest("tests"), again])
    _keep_accuracy(result)
    return result


@pytest.fixture(scope="module")
def boots(request: pytest.FixtureRequest, lacks: Callable[[str], NoReturn]) -> Iterator[dict[Guest, Future[Result]]]:
    """The guests of this run, some of them at a time."""
    missing = images.missing_tools()
    if missing:
        lacks(f"guests need {', '.join(missing)}; install them with apt-get")
    if os.geteuid() != 0:
        lacks("root file systems of guests are made by root; use sudo")
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = dict.fromkeys(call.params["booted"] for call in calls if call and "booted" in call.params)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {one: pool.submit(_boot, one) for one in wanted}


@pytest.fixture(scope="module", params=images.chosen(os.environ.get(CHOICE, "")), ids=lambda one: one.name)
def booted(
    request: pytest.FixtureRequest,
    boots: dict[Guest, Future[Result]],
    lacks: Callable[[str], NoReturn],
    note: Callable[[str], None],
) -> tuple[Guest, Result]:
    """One boot for all the tests of a guest."""
    which: Guest = request.param
    try:
        result = boots[which].result()
    except CannotBuildError as error:
        lacks(f"no guest {which.name}: {error}")
    note(
        f"guest {which.name}: init after {result.boot_s:.0f} s, all done after {result.total_s:.0f} s"
        f"{' (lost)' if result.lost else ''}"
    )
    return which, result


def lines(name: str, loads: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each set of forbidden hook kinds and collector: hooks with fidelity."""
    found = []
    for forbidden, outcomes in loads.items():
        for collector, outcome in outcomes.items():
            hooks = ", ".join(f"{hook} {fidelity}" for _, hook, fidelity in outcome["hooks"])
            without = f"without {forbidden}" if forbidden else "all hooks"
            found.append(f"{name} | {without} | {collector} | {hooks or 'does not load'}")
    return found


def test_every_collector_loads_on_the_expected_hooks(booted: tuple[Guest, Result]) -> None:
    """The hooks are those in hooks.txt, which BPFMETRICSD_UPDATE_GOLDEN=1 renews for the guests that run."""
    which, result = booted
    loads = json.loads(result.text("loads.json", "loads"))
    errors = {name: outcome["error"] for name, outcome in loads[""].items() if outcome["error"]}
    assert errors == {}
    found = lines(which.name, loads)
    known = HOOKS.read_text().splitlines() if HOOKS.exists() else []
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        others = [line for line in known if not line.startswith(f"{which.name} |")]
        order = [one.name for one in images.GUESTS]
        known = sorted([*others, *found], key=lambda line: order.index(line.split(" |")[0]))
        HOOKS.write_text("\n".join(known) + "\n")
    assert found == [line for line in known if line.startswith(f"{which.name} |")]


def test_kernel_tests(
    booted: tuple[Guest, Result], report: Callable[[str, Case], None], note: Callable[[str], None]
) -> None:
    """Each of the guest's tests is reported on its own; this one fails when the guest was lost or ran none."""
    which, result = booted
    status = int(result.text("tests.status", "tests"))
    said = "\n".join(result.files.get("tests.out", "").splitlines()[-40:])
    assert status in (0, 1), f"pytest ended with status {status} in the guest:\n{said}"
    found = {case.name: case for case in cases(result.text("tests.xml", "tests"))}
    assert found, f"no test ran in the guest:\n{said}"
    if any(case.outcome == "failed" for case in found.values()):
        for case in cases(result.text("again.xml", "again")):
            why = "; ".join(line for line in found[case.name].text.splitlines() if line.startswith("E  "))
            note(f"guest {which.name}: {case.name} {case.outcome} when asked again, after {why}")
            found[case.name] = case
    for case in found.values():
        report(which.name, case)
