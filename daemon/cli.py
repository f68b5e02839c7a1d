# SPDX-License-Identifier: Apache-2.0
"""The command line: what it takes, how it helps, and how it says what went wrong."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from daemon import __version__, commands
from daemon.commands import complain, default_config
from daemon.errors import BpfmetricsdError, UsageError

DEBUG = "BPFMETRICSD_DEBUG"
INTERRUPTED, PIPE_CLOSED = 130, 141  # what a shell reports of a command that SIGINT or SIGPIPE ended

_ABOUT = """\
BPF programs count in the kernel; bpfmetricsd loads them and shows the counts to Prometheus.

The programs and their counts stay in the kernel without any process: the server may stop, crash or be
upgraded, and nothing is lost before `unload` or a reboot. All in one, to try it out:

  sudo bpfmetricsd run                  then open http://127.0.0.1:10435

The same in its steps, as the systemd units do it:

  bpfmetricsd check                     is the file right, and what does this kernel allow?
  sudo bpfmetricsd load                 compile and attach the programs (about two seconds; later loads less)
  sudo bpfmetricsd serve                answer Prometheus, as an ordinary user
  sudo bpfmetricsd status               is all well?
  sudo bpfmetricsd show biolatency 1    the counts in the terminal
  sudo bpfmetricsd unload               leave nothing behind
"""
_STATUSES = """\
exit status: 0 fine; 1 failed at run time; 2 wrong usage or configuration; 3 this kernel or these privileges
do not allow it. `bpfmetricsd COMMAND --help` says more, with an example."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see '{self.prog} --help'")
        raise SystemExit(UsageError.status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. Whatever goes wrong is one line on stderr for each problem."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        status = command(arguments)
        print(end="", flush=True)  # a full disk shows here, not when Python ends
        return status
    except UsageError as error:
        complain(*error.problems)
        return error.status
    except BpfmetricsdError as error:
        complain(str(error))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at the end
        return PIPE_CLOSED
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    elif isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0].replace("_", "-")
        complain(f"the Python module {error.name} is missing; run 'make setup', or install python3-{package}")
    elif isinstance(error, OSError):
        complain(f"the system refused: {error}; run it again with {DEBUG}=1 to see where")
    else:
        what = f"{type(error).__name__}: {error}"
        complain(f"unexpected {what}; run it again with {DEBUG}=1 for the traceback, and report that")
    return BpfmetricsdError.status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bpfmetricsd", description=_ABOUT, epilog=_STATUSES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"bpfmetricsd {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], int], summary: str, more: str, example: str) -> _Parser:
        made: _Parser = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}", epilog=f"example:  {example}",
            allow_abbrev=False,
        )  # fmt: skip
        made.set_defaults(command=function)
        if function is not commands.list_collectors:
            made.add_argument("--config", type=_path, default=default_config(), metavar="F",
                              help="the configuration file (default: %(default)s)")  # fmt: skip
        return made

    _add_servers(add)
    _add_loaders(add)
    _add_readers(add)
    return parser


_Add = Callable[[str, Callable[[argparse.Namespace], int], str, str, str], _Parser]


def _add_servers(add: _Add) -> None:
    run = add(
        "run", commands.run, "load, drop privileges, serve in the foreground",
        "Ctrl-C or SIGTERM ends it and leaves the programs counting; SIGHUP reads the configuration again.",
        "sudo bpfmetricsd run --unload-on-exit",
    )  # fmt: skip
    run.add_argument("--unload-on-exit", action="store_true",
                     help="unload at the end; a small process stays root for that")  # fmt: skip
    serve = add(
        "serve", commands.serve, "serve what is loaded, and load nothing",
        "Started as root it becomes an ordinary user without capabilities; otherwise it needs the right to read the"
        " pins.",
        "sudo bpfmetricsd serve --user bpfmetricsd",
    )  # fmt: skip
    for command in (run, serve):
        _add_user(command, "whom to serve as")


def _add_loaders(add: _Add) -> None:
    load = add(
        "load", commands.load, "compile, attach and pin the programs that the configuration names",
        "Does the least that is right: what is loaded stays, what changed is replaced without losing counts, and what"
        " the file no longer names is unloaded. One collector's failure leaves the others in place (exit status 1).",
        "sudo bpfmetricsd load --only biolatency,runqlat",
    )  # fmt: skip
    _add_user(load, "whose group may read the pins")
    load.add_argument("--force", action="store_true", help="build again also what has not changed")
    unload = add(
        "unload", commands.unload, "detach the programs and forget their counts",
        "With all collectors unloaded nothing is left in the kernel nor on disk. Faults in the installed configuration"
        " do not keep it from its work.",
        "sudo bpfmetricsd unload",
    )  # fmt: skip
    for command in (load, unload):
        command.add_argument("--only", type=_names, default=frozenset(), metavar="A,B", help="these collectors alone")
    add(
        "check", commands.check, "validate the configuration, and say which hooks this kernel allows",
        "Reports every fault in the file at once. Loads nothing and needs no privileges. Exit status 3: the kernel"
        " lacks what a collector needs.",
        "bpfmetricsd check --config new.yaml",
    )  # fmt: skip


def _add_readers(add: _Add) -> None:
    status = add(
        "status", commands.status, "say what is loaded and whether all is well",
        "Since when each collector counts, on which hooks, how full its maps are, what it costs, what it lost."
        " Exit status 1: not all is well.",
        "sudo bpfmetricsd status",
    )  # fmt: skip
    status.add_argument("--json", action="store_true", help="what /status answers")
    show = add(
        "show", commands.show, "print a collector's counts in the terminal, as the bcc tool does",
        "Without INTERVAL: all since counting began. Reads what is counted anyway, so it costs nothing more.",
        "sudo bpfmetricsd show biolatency 5 3 --by device",
    )  # fmt: skip
    show.add_argument("collector", metavar="COLLECTOR", help="one that the configuration names; see 'list'")
    show.add_argument("interval", metavar="INTERVAL", nargs="?", type=_seconds,
                      help="seconds, or such as 250ms: print what came in each")  # fmt: skip
    show.add_argument("count", metavar="COUNT", nargs="?", type=_count, help="how many; else until Ctrl-C")
    show.add_argument("--by", metavar="LABEL", help="one histogram for each value of this label")
    add("list", commands.list_collectors, "name every collector, with its options and their defaults",
        "The options go below the collector's name in the configuration.", "bpfmetricsd list")  # fmt: skip


def _add_user(command: argparse.ArgumentParser, purpose: str) -> None:
    default = "bpfmetricsd if there is such a user, else nobody"
    command.add_argument("--user", metavar="U", help=f"{purpose} (default: {default})")


def _names(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))


def _path(text: str) -> Path:
    """Absolute: `run` loads in another folder, and the server stands in one of its own."""
    return Path(text).absolute()


def _seconds(text: str) -> float:
    from daemon.fields import parse_duration

    try:
        seconds = parse_duration(f"{text}s" if text[-1:].isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; write seconds such as 1, or 250ms") from None
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is out of range; from 100ms to 24h")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no count; write a whole number from 1 on")
    return int(text)
