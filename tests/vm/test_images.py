# SPDX-License-Identifier: Apache-2.0
"""What decides about guests, without booting one."""

from __future__ import annotations

import subprocess

import pytest

from tests.vm import guest, images
from tests.vm.guest import Command
from tests.vm.images import CannotBuildError
from tests.vm.junit import Case, cases


def test_guests_are_chosen_by_name() -> None:
    assert images.chosen("") == images.GUESTS
    assert [one.name for one in images.chosen("7.2, 5.10")] == ["7.2", "5.10"]
    with pytest.raises(ValueError, match=r"there is no guest 6\.2; known: 5\.10, 6\.1, "):
        images.chosen("6.1,6.2")


def test_newest_kernel_is_chosen_by_number() -> None:
    names = [
        "linux-image-6.1.0-9-amd64", "linux-image-6.1.0-56-amd64", "linux-image-6.1.0-57-cloud-amd64",
        "linux-image-6.1.0-58-amd64-unsigned", "linux-image-6.12.117+deb12-amd64", "linux-image-6.12.90+deb12.1-amd64",
    ]  # fmt: skip
    assert images.newest(names, "6.1") == "6.1.0-56-amd64"
    assert images.newest(names, "6.12") == "6.12.117+deb12-amd64"
    with pytest.raises(CannotBuildError, match=r"no kernel 6\.2 any more"):
        images.newest(names, "6.2")


def test_archive_is_what_cpio_wrote() -> None:
    archive = images.cpio([("bin", 0o40755, b""), ("bin/init", 0o100755, b"#!\n")])
    assert len(archive) % 4 == 0
    first = b"070701" + b"00000001" + b"000041ed" + b"00000000" * 2 + b"00000001" + b"00000000" * 6
    assert archive.startswith(first + b"00000004" + b"00000000" + b"bin\0")
    assert b"000081ed" in archive
    assert b"bin/init\0\0#!\n\0" in archive
    assert b"TRAILER!!!\0" in archive


def test_script_is_sound_and_quotes() -> None:
    script = guest._script([Command("tests", ("pytest", "-k", "a or b"))])
    assert "run tests pytest -k 'a or b'\n" in script
    subprocess.run(["sh", "-n"], input=script.encode(), check=True)
    subprocess.run(["sh", "-n"], input=images._INIT.encode(), check=True)


def test_cases_of_a_junit_file() -> None:
    text = """<testsuites><testsuite>
        <testcase classname="tests.kernel.test_a" file="tests/kernel/test_a.py" name="test_x[1]" time="1.5"/>
        <testcase file="test_a.py" name="test_y" time="0"><failure message="short">long</failure></testcase>
        <testcase file="test_a.py" name="test_z" time="0"><skipped message="no kprobes">at</skipped></testcase>
        </testsuite></testsuites>"""
    assert cases(text) == [
        Case("tests/kernel/test_a.py::test_x[1]", "passed", "", 1.5),
        Case("test_a.py::test_y", "failed", "long", 0.0),
        Case("test_a.py::test_z", "skipped", "no kprobes", 0.0),
    ]
