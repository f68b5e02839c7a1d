# SPDX-License-Identifier: Apache-2.0
"""Notifications as a real datagram socket receives them."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.errors import UnsupportedError
from daemon.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    pytest.importorskip("systemd.daemon", reason="install python3-systemd")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(sock: socket.socket) -> str:
    return sock.recv(4096).decode()


def test_everything_it_says(manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.ready()
    assert heard(manager) == "READY=1"
    notifier.ready("6 collectors")
    assert heard(manager) == "READY=1\nSTATUS=6 collectors"
    notifier.status("5 collectors")
    assert heard(manager) == "STATUS=5 collectors"
    notifier.watchdog()
    assert heard(manager) == "WATCHDOG=1"
    notifier.stopping()
    assert heard(manager) == "STOPPING=1"


def test_reloading_carries_the_time(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier().reloading()
    match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", heard(manager))
    assert match
    assert before <= int(match[1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_status_stays_one_assignment(manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.status(" c.yaml:3: bad\nMAINPID=1\r\n ☃ ")
    assert heard(manager) == "STATUS=c.yaml:3: bad MAINPID=1 ☃"
    notifier.status("\n")
    notifier.stopping()
    assert heard(manager) == "STOPPING=1"


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready("6 collectors")
    notifier.status("")
    notifier.reloading()
    notifier.stopping()
    notifier.watchdog()
    assert notifier.watchdog_interval is None


def test_a_lost_manager_does_not_stop_the_service(manager: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier()
    manager.close()
    (tmp_path / "notify").unlink()
    notifier.ready()


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd.daemon", None)
    with pytest.raises(UnsupportedError, match="install python3-systemd"):
        Notifier({"NOTIFY_SOCKET": "/run/systemd/notify"})


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval: float | None) -> None:
    assert Notifier(environ).watchdog_interval == interval
