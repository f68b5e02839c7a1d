# SPDX-License-Identifier: Apache-2.0
"""A Debian 12 with the package, its own kernel and systemd as the first process: twice, as a machine that reboots."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

import collectors
from collectors import oomkill
from tests.service import root
from tests.vm import guest, images, life
from tests.vm.guest import Result
from tests.vm.images import CannotBuildError

pytestmark = pytest.mark.vm

KERNEL = "6.1"
TOTAL_S = 900
_SIZE = "2G"  # sparse
_UNIT = """\
[Unit]
After=bpfmetricsd.service

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -m tests.vm.life
WorkingDirectory=/job/checkout
StandardOutput=file:/dev/ttyS0
TimeoutStartSec=infinity
"""
_WANTS = "etc/systemd/system/multi-user.target.wants"
_MASKED = ("serial-getty@ttyS0.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer")
_INIT = "#!/bin/sh\nexec /lib/systemd/systemd\n"
WAITS = "bpf_run_queue_latency_seconds_count"  # never stands still
ACCESSES = "bpf_page_cache_accesses_total"
Boots = tuple[dict[str, Any], dict[str, Any]]


def _disk(folder: Path) -> Path:
    """A root file system with the package installed and enabled. Raises `CannotBuildError`."""
    base = root.build()
    tree, packages, disk = folder / "tree", folder / "packages", folder / "disk"
    packages.mkdir()
    root.build_packages(root.SUITE, base, packages, "99.0")
    subprocess.run(["cp", "-a", base, tree], check=True)
    root.install(tree, packages)
    (tree / "etc/systemd/system/life.service").write_text(_UNIT)
    (tree / _WANTS).mkdir(parents=True, exist_ok=True)
    (tree / _WANTS / "life.service").symlink_to("/etc/systemd/system/life.service")
    for unit in _MASKED:
        (tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (tree / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")  # with none systemd asks questions
    (tree / "etc/hostname").write_text("guest\n")
    every = ", ".join(f"{one.name}: {{}}" for one in collectors.ALL)
    (tree / "etc/bpfmetricsd/bpfmetricsd.yaml").write_text(f"collectors: {{{every}}}\n")
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-d", tree, disk, _SIZE], check=True)
    shutil.rmtree(tree)
    return disk


def _facts(result: Result) -> dict[str, Any]:
    if result.lost:
        raise result.lost
    if "error" in result.files:
        raise AssertionError(f"in the guest: {result.files['error']}")
    return {name: json.loads(text) for name, text in result.files.items() if text.startswith("{")}


@pytest.fixture(scope="module")
def boots(lacks: Callable[[str], NoReturn], note: Callable[[str], None]) -> Boots:
    """What was seen in the first boot and in the second."""
    if missing := images.missing_tools() + root.missing_tools():
        lacks(f"guests need {', '.join(missing)}; install them with apt-get")
    if os.geteuid() != 0:
        lacks("root file systems of guests are made by root; use sudo")
    with tempfile.TemporaryDirectory(prefix="bpfmetricsd-boot-") as folder:
        try:
            (which,) = images.chosen(KERNEL)
            image = replace(images.build(which), root=_disk(Path(folder)))
        except CannotBuildError as error:
            lacks(f"no guest: {error}")
        results = [guest.boot(image, _INIT, TOTAL_S)]
        if not results[0].lost:
            results.append(guest.boot(image, _INIT, TOTAL_S))
    for number, result in enumerate(results, 1):
        note(f"systemd in a guest, boot {number}: {result.boot_s:.0f} s, all done after {result.total_s:.0f} s")
    first, second = (_facts(result) for result in results)
    return first, second


def counts(facts: dict[str, Any]) -> None:
    boot = facts["boots"]
    every = len(collectors.ALL)
    assert boot["states"] == ["active", "active"], boot["log"]
    assert boot["status"] == f"{every} of {every} collectors up", boot["log"]
    assert boot["collectors"] == {one.name: True for one in collectors.ALL}
    assert 0 < boot["first"][WAITS] < boot["second"][WAITS]


def test_it_counts_after_boot(boots: Boots) -> None:
    counts(boots[0])


def test_it_counts_after_a_reboot(boots: Boots) -> None:
    """Anew: nothing of the first boot is left, and the created times are of this one."""
    first, second = (one["boots"] for one in boots)
    counts(boots[1])
    assert first["boot_id"] != second["boot_id"]
    booted = second["now"] - second["uptime_s"]
    assert [name for name, started in second["started"].items() if started < booted] == []


def test_a_unit_over_its_memory_limit_is_in_the_journal_with_every_field(boots: Boots) -> None:
    found = boots[0]["kills"]
    assert found["result"] == "oom-kill"
    (entry,) = found["entries"]
    assert entry["MESSAGE_ID"] == oomkill.MESSAGE_ID
    assert entry["SYSLOG_IDENTIFIER"] == "bpfmetricsd"
    assert entry["_SYSTEMD_UNIT"] == life.SERVER
    assert entry["PRIORITY"] == "3"
    assert entry["BPF_COMM"] == entry["BPF_KILLER_COMM"] == "python3"
    assert entry["BPF_PID"] == entry["BPF_KILLER_PID"]
    assert entry["BPF_SCOPE"] == "memcg"
    assert entry["BPF_CGROUP"] == f"/system.slice/{life.VICTIM}"
    assert entry["BPF_UNIT"] == life.VICTIM
    parts = [int(entry[f"BPF_{kind}_BYTES"]) for kind in ("ANON", "FILE", "SHMEM")]
    assert int(entry["BPF_RSS_BYTES"]) == sum(parts)
    assert life.MEBIBYTES << 19 < parts[0] <= life.MEBIBYTES << 20
    assert entry["BPF_OOM_SCORE_ADJ"] == "0"
    assert entry["BPF_TIMESTAMP"].endswith("Z")
    label = f'bpf_oom_kills_total{{scope="memcg",cgroup="/system.slice/{life.VICTIM}"}}'
    assert found["page"][label] == 1


def test_the_server_lives_within_a_memory_limit(boots: Boots) -> None:
    found = boots[0]["limited"]
    assert found["limit"] == life.MEBIBYTES << 20
    assert 0 < found["current"] <= found["limit"]
    assert (found["events"]["oom_kill"], found["restarts"]) == ("0", 0)
    assert found["after"][WAITS] >= found["before"][WAITS] > 0


@pytest.mark.parametrize(
    ("setting", "kinds", "goes_on"),
    [
        ("tp_btf", {"fexit", "fentry", "raw_tp"}, True),
        ("tp_btf,fentry,fexit 2", {"kprobe", "kretprobe", "raw_tp"}, False),  # kprobes keep more for each task
    ],
)
def test_other_kinds_of_hooks_load_within_the_sandbox(
    boots: Boots, setting: str, kinds: set[str], goes_on: bool
) -> None:
    """And count on from where the others stopped, or anew where their maps are different."""
    found = boots[0]["hooks"][setting]
    assert (found["up"], found["error"]) == (True, None)
    assert {hook.split(":")[0] for hook in found["hooks"]} == kinds
    assert found["went_on"] is goes_on
    assert found["after"][ACCESSES] > (found["before"][ACCESSES] if goes_on else 0)


def test_kprobes_need_a_kernel_that_is_less_paranoid_than_debians(boots: Boots) -> None:
    """It says what to set; what was loaded before counts on."""
    found = boots[0]["hooks"]["tp_btf,fentry,fexit"]
    assert "kernel.perf_event_paranoid=3 leaves kprobes to CAP_SYS_ADMIN, set it to 2" in found["error"]
    assert {hook.split(":")[0] for hook in found["hooks"]} == {"fexit", "fentry", "raw_tp"}
    assert (found["up"], found["went_on"]) == (True, True)
    assert found["after"][ACCESSES] > found["before"][ACCESSES] > 0
