# SPDX-License-Identifier: Apache-2.0
"""Dropping privileges, in a child that is thrown away."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon import privileges
from daemon.errors import UsageError

ROOT = Path(privileges.__file__).parents[1]
NOBODY = pwd.getpwnam("nobody")
BPF = 1 << privileges.CAP_BPF

CHILD = """
import json, os, sys
sys.path.insert(0, {root!r})
from daemon import privileges
from daemon.errors import BpfmetricsdError
{first}
try:
    privileges.drop({user!r}, {keep_bpf})
except BpfmetricsdError as error:
    print(json.dumps({{"error": str(error), "exit": error.status}}))
    raise SystemExit
result = privileges._status()
for name, undo in (("setuid", lambda: os.setuid(0)), ("setgid", lambda: os.setgid(0))):
    try:
        undo()
        result[name] = "regained"
    except PermissionError:
        pass
print(json.dumps(result))
"""

SECOND_THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root; run the tests with sudo")


def in_child(user: str, keep_bpf: bool, first: str = "") -> dict[str, Any]:
    code = CHILD.format(root=str(ROOT), user=user, keep_bpf=keep_bpf, first=first)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def capabilities(status: dict[str, Any]) -> dict[str, int]:
    return {name: int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")}


@pytest.mark.kernel
@needs_root
@pytest.mark.parametrize("keep_bpf", [False, True])
def test_root_becomes_nobody_for_good(keep_bpf: bool) -> None:
    status = in_child("nobody", keep_bpf)
    assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    assert status["Gid"].split() == [str(NOBODY.pw_gid)] * 4
    assert status["Groups"] == ""
    assert status["NoNewPrivs"] == "1"
    kept = BPF if keep_bpf else 0
    assert capabilities(status) == {"Inh": 0, "Prm": kept, "Eff": kept, "Bnd": kept, "Amb": 0}
    assert not status.keys() & {"setuid", "setgid"}


@pytest.mark.kernel
@needs_root
@pytest.mark.parametrize("keep_bpf", [False, True])
def test_ordinary_user_stays_who_it_is(keep_bpf: bool) -> None:
    status = in_child("no-such-user", keep_bpf, first="os.setgroups([]); os.setgid(12345); os.setuid(12345)")
    assert status["Uid"].split() == ["12345"] * 4
    assert status["NoNewPrivs"] == "1"
    found = capabilities(status)
    del found["Bnd"]
    assert set(found.values()) == {0}


@pytest.mark.kernel
@needs_root
@pytest.mark.parametrize("keep_bpf", [False, True])
def test_capabilities_that_systemd_gave_an_ordinary_user(keep_bpf: bool) -> None:
    """AmbientCapabilities=CAP_BPF CAP_NET_ADMIN with User=."""
    first = """
privileges._prctl(privileges._PR_SET_KEEPCAPS, 1)
os.setgroups([]); os.setgid(12345); os.setuid(12345)
privileges._set_capabilities(1 << privileges.CAP_BPF | 1 << 12)
"""
    found = capabilities(in_child("nobody", keep_bpf, first))
    kept = BPF if keep_bpf else 0
    assert (found["Prm"], found["Eff"], found["Amb"]) == (kept, kept, 0)


@pytest.mark.kernel
@needs_root
def test_root_without_the_power_to_drop() -> None:
    result = in_child("nobody", False, first="privileges._set_capabilities(0)")
    assert result["exit"] == 1
    assert result["error"].startswith(
        "cannot drop root's privileges to the user nobody: Operation not permitted; start"
    )


@pytest.mark.kernel
@needs_root
def test_a_second_thread_would_keep_its_capabilities() -> None:
    result = in_child("nobody", False, first=SECOND_THREAD)
    assert "Threads 2" in result["error"]


@pytest.mark.parametrize(
    ("user", "message"),
    [("no-such-user", "create it with: useradd --system .* no-such-user$"), ("root", "name an ordinary user")],
)
def test_user_that_will_not_do(monkeypatch: pytest.MonkeyPatch, user: str, message: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(UsageError, match=message):
        privileges.drop(user, keep_bpf=False)


def test_default_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", missing)
    assert privileges.default_user() == "nobody"
    monkeypatch.setattr(pwd, "getpwnam", lambda _: pwd.struct_passwd(("bpfmetricsd", "x", 999, 999, "", "/", "/")))
    assert privileges.default_user() == "bpfmetricsd"


CLEAN = {
    "Uid": "65534\t65534\t65534\t65534",
    "Gid": "65534\t65534\t65534\t65534",
    "Groups": "",
    "NoNewPrivs": "1",
    "Threads": "1",
    "CapInh": "0000000000000000",
    "CapPrm": "0000008000000000",
    "CapEff": "0000008000000000",
    "CapBnd": "0000008000000000",
    "CapAmb": "0000000000000000",
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"Uid": "65534\t65534\t0\t65534"}, ["Uid 65534\t65534\t0\t65534"]),
        ({"Groups": "0"}, ["Groups 0"]),
        ({"NoNewPrivs": "0"}, ["NoNewPrivs 0"]),
        ({"CapEff": "000000c000000000"}, ["CapEff 000000c000000000"]),
        ({"CapAmb": "0000008000000000"}, ["CapAmb 0000008000000000"]),
    ],
)
def test_leftovers(change: dict[str, str], found: list[str]) -> None:
    assert privileges.leftovers({**CLEAN, **change}, 65534, 65534, BPF, was_root=True) == found


def test_what_the_kernel_does_not_say_is_left_over() -> None:
    assert len(privileges.leftovers({}, 65534, 65534, BPF, was_root=True)) == 10


def test_only_root_can_give_up_groups_and_the_bounding_set() -> None:
    status = {**CLEAN, "Groups": "27", "CapBnd": "f" * 16}
    assert privileges.leftovers(status, 65534, 65534, BPF, was_root=False) == []
