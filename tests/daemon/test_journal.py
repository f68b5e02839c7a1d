# SPDX-License-Identifier: Apache-2.0
"""Events as the journal's own protocol carries them, and as lines on stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import journal
from daemon.declare import Event

ROOT = Path(journal.__file__).parents[1]
EVENT = Event(
    message_id="0123456789abcdef0123456789abcdef",
    priority=4,
    message='oom "killed"\nstress\udcff',
    fields={"pid": 123, "comm": "a b\nPRIORITY=0\x1b[31m", "cgroup": "/a/b", "rss-bytes": 4096},
    timestamp=1700000000.25,
)


def test_without_journald_a_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal.Journal(str(tmp_path / "socket")).send(EVENT)
    assert capsys.readouterr().err == (
        '2023-11-14T22:13:20.250000Z oom "killed"\\nstress\\udcff BPF_PID=123'
        ' BPF_COMM="a b\\nPRIORITY=0\\x1b[31m" BPF_CGROUP=/a/b BPF_RSS_BYTES=4096\n'
    )


class FullDisk(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_raises_without_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    stderr = FullDisk()
    if closed:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    journal.Journal(str(tmp_path / "socket")).send(EVENT)


def test_a_refused_entry_goes_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(105, "No buffer space available")

    monkeypatch.setattr(journal, "_send", refuse)
    (tmp_path / "socket").touch()
    journal.Journal(str(tmp_path / "socket")).send(EVENT)
    assert "BPF_PID=123" in capsys.readouterr().err


def test_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "systemd.journal", None)
    monkeypatch.setattr(journal, "_send", journal._library())
    (tmp_path / "socket").touch()
    journal.Journal(str(tmp_path / "socket")).send(EVENT)
    assert "BPF_PID=123" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("pid", "BPF_PID"),
        ("cgroup.path", "BPF_CGROUP_PATH"),
        ("été", "BPF__T_"),
        ("n" * 100, "BPF_" + "N" * 60),
    ],
)
def test_field_name(name: str, field: str) -> None:
    assert journal.field_name(name) == field


@pytest.mark.parametrize(
    ("timestamp", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1700000000.000001, "2023-11-14T22:13:20.000001Z"),
        (float("nan"), "?"),
        (float("inf"), "?"),
        (1e300, "?"),
    ],
)
def test_iso_time(timestamp: float, text: str) -> None:
    assert journal.iso_time(timestamp) == text


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers()), st.floats())
def test_any_event_is_one_printable_line(message: str, fields: dict[str, str | int], timestamp: float) -> None:
    line = journal.line(Event("0" * 32, 6, message, fields, timestamp))
    assert line.isprintable()
    entry = journal.entry(Event("0" * 32, 6, message, fields, timestamp))
    assert all(value.encode() is not None for value in entry.values())


RECEIVER = """
import json, os, socket, struct, sys
sys.path.insert(0, {root!r})
SOCKET = "/run/systemd/journal/socket"
os.makedirs(os.path.dirname(SOCKET))
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(SOCKET)
receiver.settimeout(20)
from daemon.journal import Journal  # only now: it looks for a journald when it is imported
from test_journal import EVENT
Journal().send(EVENT)
data, entry = receiver.recv(1 << 16), {{}}
while data:
    head, data = data.split(b"\\n", 1)
    if b"=" in head:
        name, value = head.split(b"=", 1)
    else:
        name, size = head, struct.unpack("<Q", data[:8])[0]
        value, data = data[8 : 8 + size], data[9 + size :]
    entry[name.decode()] = value.decode()
print(json.dumps(entry))
"""


@pytest.mark.kernel
def test_entry_as_journald_receives_it() -> None:
    """In a mount namespace, where /run is our own."""
    pytest.importorskip("systemd.journal", reason="install python3-systemd")
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare; install util-linux")
    code = RECEIVER.format(root=str(ROOT))
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$0" -c "$1"', sys.executable, code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    entry = json.loads(result.stdout)
    assert (
        entry.items()
        >= {
            "MESSAGE": 'oom "killed"\nstress?',
            "MESSAGE_ID": EVENT.message_id,
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "bpfmetricsd",
            "BPF_PID": "123",
            "BPF_COMM": "a b\nPRIORITY=0\x1b[31m",
            "BPF_CGROUP": "/a/b",
            "BPF_RSS_BYTES": "4096",
            "BPF_TIMESTAMP": "2023-11-14T22:13:20.250000Z",
        }.items()
    )
