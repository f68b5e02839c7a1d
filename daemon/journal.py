# SPDX-License-Identifier: Apache-2.0
"""Notable events as structured journal entries, or as lines on stderr where no journald runs."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from daemon.declare import Event

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "bpfmetricsd"

_FIELD_NAME_MAX = 64  # journald ignores fields with longer names
_PLAIN_VALUE = re.compile(r"[\w./:@%+,-]+", re.ASCII)


def _library(socket: str = SOCKET) -> Callable[..., object] | None:
    """journal.send; None where python3-systemd is missing or no journald runs, and then it costs no memory."""
    if not Path(socket).exists():
        return None
    try:
        send: Callable[..., object] = import_module("systemd.journal").send
    except ImportError:
        return None
    return send


# Imported with this module: later, the service's user may not be allowed to read the library.
_send = _library()


class Journal:
    """Sends events; one that cannot be sent is printed, and one that cannot be printed is lost. Nothing raises."""

    def __init__(self, socket: str = SOCKET) -> None:
        self._socket = Path(socket)

    def send(self, event: Event) -> None:
        if self._sent(event):
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed or absent
            print(line(event), file=sys.stderr, flush=True)

    def _sent(self, event: Event) -> bool:
        # journal.send loses the message without an error when nobody listens.
        if _send is None or not self._socket.exists():
            return False
        try:
            _send(_encodable(event.message), **entry(event))
        except Exception:  # a full socket, a field that the library refuses: stderr is still there
            return False
        return True


def entry(event: Event) -> dict[str, str]:
    """The journal fields beside MESSAGE."""
    return {
        "MESSAGE_ID": event.message_id,
        "PRIORITY": str(event.priority),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        **{field_name(name): _encodable(str(value)) for name, value in event.fields.items()},
        "BPF_TIMESTAMP": iso_time(event.timestamp),
    }


def line(event: Event) -> str:
    """The event as one printable line: time, message, key=value."""
    pairs = [f"{field_name(name)}={_quoted(value)}" for name, value in event.fields.items()]
    return " ".join([iso_time(event.timestamp), escaped(event.message), *pairs])


def field_name(name: str) -> str:
    """`cgroup.path` becomes `BPF_CGROUP_PATH`: journald takes upper-case ASCII letters, digits and underscores."""
    return "BPF_" + re.sub("[^A-Z0-9]", "_", name.upper())[: _FIELD_NAME_MAX - len("BPF_")]


def iso_time(timestamp: float) -> str:
    """Seconds since the epoch as UTC with microseconds; `?` for what is no time of our calendar."""
    try:
        return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (OSError, OverflowError, ValueError):
        return "?"


def escaped(text: str) -> str:
    """`text` on one line; whatever does not print (a comm can hold any byte) becomes an escape."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in text
    )


def _quoted(value: str | int) -> str:
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else '"' + escaped(text).replace('"', '\\"') + '"'


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which stand for bytes that are no UTF-8."""
    return text.encode(errors="replace").decode()
