# SPDX-License-Identifier: Apache-2.0
"""What systemd is told (sd_notify) and what it asks for (the watchdog). Without systemd every call does nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module

from daemon.errors import UnsupportedError


class Notifier:
    """Speaks to the service manager that `NOTIFY_SOCKET` names.

    UnsupportedError: there is such a socket, and python3-systemd is not installed.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._notify = _notify_function() if environ.get("NOTIFY_SOCKET") else None
        self.watchdog_interval = _watchdog_interval(environ)

    def ready(self, status: str = "") -> None:
        self._send("READY=1", *_status(status))

    def status(self, line: str) -> None:
        self._send(*_status(line))

    def reloading(self) -> None:
        """Type=notify-reload wants the time as well; `ready` ends the reload."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if self._notify and assignments:
            with contextlib.suppress(OSError):  # the manager is restarting; the service goes on
                self._notify("\n".join(assignments))


def _notify_function() -> Callable[[str], object]:
    try:
        notify: Callable[[str], object] = import_module("systemd.daemon").notify
    except ImportError:
        raise UnsupportedError(
            "systemd cannot be notified without the module systemd; install python3-systemd, or use Type=exec"
        ) from None
    return notify


def _status(line: str) -> list[str]:
    """A line break would begin another assignment."""
    text = " ".join(line.split())
    return [f"STATUS={text}"] if text else []


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Seconds between two pings: half of what systemd allows, or None when it does not watch this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (usec.isascii() and usec.isdigit()) or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1e6 / 2
