# SPDX-License-Identifier: Apache-2.0
"""The command line: usage, help, and errors in one line. What the commands do is in test_foreground.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import collectors
from daemon import __version__, cli, commands
from daemon.errors import BpfmetricsdError, UnsupportedError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("run", "serve", "load", "unload", "check", "status", "show", "list")


def ended(*arguments: str) -> int:
    """The exit status, also where argparse ends the process itself."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


# Usage


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(command, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(rf"\nexample: .*bpfmetricsd {command}", text)
    assert ("--config" in text) == (command != "list")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "exit status: 0 fine;" in text
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"bpfmetricsd {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: COMMAND"),
        (("lod",), "invalid choice: 'lod'"),
        (("load", "--conf", "x"), "unrecognized arguments"),
        (("show",), "required: COLLECTOR"),
        (("show", "runqlat", "x"), "'x' is not a duration; write seconds"),
        (("show", "runqlat", "0.01"), "out of range"),
        (("show", "runqlat", "1", "0"), "'0' is no count"),
        (("show", "runqlat", "1", "-1"), "'-1' is no count"),
        (("show", "runqlatt"), "did you mean runqlat? known: biolatency"),
        (("load", "--only", "tcplive"), "did you mean tcplife?"),
        (("check", "--config", "/nonexistent"), "/nonexistent: there is no such file"),
        (("serve", "--user", "no such user"), "--user no such user: there is no such user"),
        (("run", "--user", "root"), "--user root: the server is never root"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bpfmetricsd: ")
    assert words in err


def test_every_fault_in_the_file_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("interval: 5\ncolectors: {}\ncollectors: {runqlat: {by: cpu}}\n")
    assert ended("check", "--config", str(path)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{path}:1", f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (BpfmetricsdError("it\nfailed"), 1, "it failed"),
        (UnsupportedError("not here"), 3, "not here"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'; run it again with BPFMETRICSD_DEBUG=1"),
        (OSError(28, "No space left on device"), 1, "the system refused: [Errno 28] No space"),
        (ModuleNotFoundError("no", name="prometheus_client.core"), 1, "install python3-prometheus-client"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(commands, "list_collectors", fail)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert ended("list") == status
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == bool(words)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "list_collectors", lambda _: 1 // 0)
    monkeypatch.setenv(cli.DEBUG, "1")
    assert ended("list") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "daemon", "list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, cli.PIPE_CLOSED)


def test_the_installed_configuration_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "INSTALLED_CONFIG", tmp_path / "c.yaml")
    assert commands.default_config() == ROOT / "config" / "bpfmetricsd.yaml"
    (tmp_path / "c.yaml").touch()
    assert commands.default_config() == tmp_path / "c.yaml"


def test_the_server_holds_nothing_of_the_compiler() -> None:
    heavy = ["loader", "build", "compiler", "btf", "attach", "multiprocessing", "bcc", "webconfig", "show"]
    code = (
        "import sys; from daemon import cli, foreground; "
        f"print([name for name in {heavy} if name in sys.modules or f'daemon.{{name}}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_list_names_every_collector_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("list") == 0
    text = capsys.readouterr().out
    for collector in collectors.ALL:
        assert f"{collector.name} " in text
        assert all(option.help in text for option in collector.options)
