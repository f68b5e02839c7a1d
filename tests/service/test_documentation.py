# SPDX-License-Identifier: Apache-2.0
"""Manual pages, completion, units and package say the same as the program. Nothing is booted here."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import yaml

import collectors
from collectors import oomkill, tcplife, tcpretrans
from daemon import __version__, cli, config
from daemon.declare import Option
from tests.service.conftest import PROJECT, blocks

PACKAGING = PROJECT / "packaging"
MAN = (PACKAGING / "man/bpfmetricsd.8").read_text()
MAN_CONFIG = (PACKAGING / "man/bpfmetricsd.yaml.5").read_text()
COMPLETION = (PACKAGING / "completion/bpfmetricsd").read_text()
EXPOSURE = {"bpfmetricsd.service": 1.5, "bpfmetricsd-load.service": 4.0}


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (one for one in cli._parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def plain(roff: str) -> str:
    """The page without macros: `.Li a ,` is `a ,`."""
    lines = (re.sub(r"^\.\w+ ?", "", line) for line in roff.splitlines() if not line.startswith('.\\"'))
    return " ".join(re.sub(r"\b(Li|Pa|No|Cm|Ar|Fl|Op|Ql) ", "", line) for line in lines)


def synopsis() -> dict[str, set[str]]:
    """Command to its long options, as SYNOPSIS has them."""
    text = MAN.split(".Sh SYNOPSIS")[1].split(".Sh DESCRIPTION")[0]
    found = {}
    for part in text.split(".Nm"):
        if command := re.search(r"\.Cm (\w+)", part):
            found[command.group(1)] = {f"--{name}" for name in re.findall(r"Fl -([\w-]+)", part)}
    return found


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    script = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _bpfmetricsd; '
        '[[ ${#COMPREPLY[@]} = 0 ]] || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = PACKAGING / "completion/bpfmetricsd"
    command = ["bash", "-c", script, "bash", str(path), "bpfmetricsd", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_the_manual_has_every_command_with_its_options() -> None:
    expected = {name: long_options(parser) - {"--help"} for name, parser in commands().items()}
    assert synopsis() == expected
    described = MAN.split(".Sh COMMANDS")[1].split(".Sh OPTIONS")[0]
    assert re.findall(r"^\.It Cm (\w+)$", described, re.MULTILINE) == list(expected)


def test_the_manual_describes_every_option() -> None:
    described = MAN.split(".Sh OPTIONS")[1].split(".Sh SIGNALS")[0]
    every = set().union(*map(long_options, commands().values())) | {"--version"}
    assert {f"--{name}" for name in re.findall(r"^\.It .*?Fl -([\w-]+)", described, re.MULTILINE)} == every


def test_completion_offers_every_command_option_and_collector() -> None:
    assert set(completed("")) == {*commands(), "--version", "--help"}
    for name, parser in commands().items():
        assert set(completed(name, "--")) == long_options(parser)
    assert completed("show", "tcp") == ["tcpretrans", "tcplife"]
    assert completed("load", "--only", "oomkill,run") == ["oomkill,runqlat"]
    assert set(completed("show", "")) >= set(collectors.BY_NAME)


def test_completion_offers_the_labels_that_show_takes() -> None:
    labels = set()
    for one in collectors.ALL:
        for choice in option_sets(one.options):
            labels |= {label for metric in one.metrics(choice) for label in metric.labels}
    offered = set(completed("show", "biolatency", "--by", ""))
    assert offered <= labels
    assert {"device", "operation", "cgroup", "family"} <= offered


def option_sets(options: tuple[Option, ...]) -> Iterator[dict[str, Any]]:
    """The defaults, and each choice once."""
    defaults: dict[str, Any] = {option.name: option.default for option in options}
    yield defaults
    for option in options:
        for choice in option.choices or ():
            yield {**defaults, option.name: choice}


def test_the_manual_has_every_key_of_the_configuration() -> None:
    keys = {key for key in config._KEYS if key != "server"}
    keys |= {f"server.{field.name}" for field in fields(config.ServerConfig)} | set(config._COMMON)
    text = MAN_CONFIG.split(".Sh KEYS")[1].split(".Sh COLLECTORS")[0]
    assert set(re.findall(r"^\.It Li (\S+)", text, re.MULTILINE)) == keys


def test_the_manual_has_every_option_of_every_collector_with_default_and_bounds() -> None:
    text = MAN_CONFIG.split(".Sh COLLECTORS")[1].split(".Sh EXAMPLES")[0]
    found = {}
    for part in re.split(r"^(?=\.It Li \w+$)", text, flags=re.MULTILINE)[1:]:
        name = part.split()[2]
        found[name] = re.findall(r"^\.It Li (\w+) No \((.*)\)$", part, re.MULTILINE)
    assert found == {one.name: [(option.name, bounds(option)) for option in one.options] for one in collectors.ALL}


def bounds(option: Option) -> str:
    match option.kind:
        case "bool":
            return f"default {str(option.default).lower()}"
        case "int":
            return f"default {option.default}; {option.minimum} to {option.maximum}"
        case "ports":
            return f"default []; at most {option.maximum}"
        case _:
            *most, last = option.choices
            return f"default {option.default}; {', '.join(most)} or {last}"


def test_the_manual_names_the_defaults_of_the_program() -> None:
    default, common = config.Config(), config.CollectorConfig()
    text = plain(MAN_CONFIG)
    for part in (
        f"server.listen (default {default.server.listen[0]})",
        f"interval (default {default.interval:g}s; 1s to 5m)",
        f"bpffs (default {default.bpffs})",
        f"state (default {default.state})",
        f"journal (default {str(default.journal).lower()})",
        f"max_series (default {common.max_series}; 10 to 100000)",
        f"exemplars (default {str(common.exemplars).lower()})",
        f"exemplar_interval (default {common.exemplar_interval:g}s; 1s to 1h)",
    ):
        assert part in text


def test_the_example_of_the_manual_is_a_configuration() -> None:
    example = MAN_CONFIG.split(".Bd -literal")[1].split(".Ed")[0].replace("\\(dq", '"')
    config.parse(example, "man", {one.name: one.options for one in collectors.ALL})


@pytest.mark.parametrize("module", [oomkill, tcpretrans, tcplife], ids=lambda module: module.__name__)
def test_the_manual_has_every_journal_entry(module: ModuleType) -> None:
    """Its MESSAGE_ID, and the fields that the collector's source names."""
    source = Path(str(module.__file__)).read_text()
    section = MAN.split(".Sh JOURNAL")[1].split(".Sh ENVIRONMENT")[0]
    entries = re.split(r"^(?=\.It )", section, flags=re.MULTILINE)
    (entry,) = (one for one in entries if module.MESSAGE_ID in one)
    body = source[source.index("\ndef event(") :].split("fields = ")[1].split("return Event")[0].split("message = ")[0]
    named = set(re.findall(r'"(\w+)": ', body))
    if "endpoints_labels" in body:
        named |= {"laddr", "lport", "raddr", "rport"}
    assert set(re.findall(r"BPF_(\w+)", entry)) == {name.upper() for name in named}


def test_manual_pages_are_sound(lacks: Callable[[str], NoReturn]) -> None:
    if shutil.which("mandoc") is None:
        lacks("mandoc is not installed; apt install mandoc")
    pages = sorted((PACKAGING / "man").iterdir())
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *pages], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_package_has_the_version_of_the_program() -> None:
    assert (PACKAGING / "debian/changelog").read_text().startswith(f"bpfmetricsd ({__version__}) ")


@pytest.mark.parametrize("unit", EXPOSURE)
def test_units_are_hardened(unit: str, lacks: Callable[[str], NoReturn]) -> None:
    if shutil.which("systemd-analyze") is None:
        lacks("systemd-analyze is not installed; apt install systemd")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(PACKAGING / "systemd" / unit)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score.group(1)) <= EXPOSURE[unit]


def test_the_configurations_of_the_operators_manual_are_valid() -> None:
    known = {one.name: one.options for one in collectors.ALL}
    own = [text for text in blocks("yaml") if "scrape_configs" not in text]
    assert own
    for text in own:
        named = "" if "collectors" in yaml.safe_load(text) else "collectors: {oomkill: {}}\n"
        config.parse(text + named, "operating.md", known)
