# SPDX-License-Identifier: Apache-2.0
"""Every variant of every collector compiles, also those for hooks that this kernel does not have or does not allow.

Whether they load and count is for the tests on other kernels.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import pytest

import collectors
from daemon import attach, loader
from daemon.attach import Planner
from daemon.btf import Btf
from daemon.compiler import compile_text, first_error
from daemon.config import CollectorConfig, parse
from daemon.declare import Collector, Part, Variant
from daemon.errors import UnsupportedError

pytestmark = pytest.mark.kernel


class Everything(Btf):
    """This kernel's types, and every tracepoint and function."""

    def tracepoint_arguments(self, name: str) -> int | None:
        return super().tracepoint_arguments(name) or 2

    def function_arguments(self, name: str) -> int | None:
        return super().function_arguments(name) or 3


def _cases() -> list[tuple[Collector, Part, Variant]]:
    return [(one, part, variant) for one in collectors.ALL for part in one.parts for variant in part.variants]


def _name(case: tuple[Collector, Part, Variant]) -> str:
    collector, part, variant = case
    return f"{collector.name}-{part.name}-{'-'.join(map(str, variant.programs.values())) or 'nothing'}"


def _defaults(name: str) -> CollectorConfig:
    options = {one.name: one.options for one in collectors.ALL}
    return parse(f"collectors: {{{name}: {{}}}}", "test", options).collectors[name]


def _compile(case: tuple[Collector, Part, Variant], answer: Connection, words: int) -> None:
    collector, part, variant = case
    os.dup2(words, 2)
    only = replace(part, variants=(replace(variant, needs=()),))
    wanted = replace(collector, parts=tuple(only if one is part else one for one in collector.parts))
    try:
        plan = Planner(wanted, loader.defines(collector, _defaults(collector.name)), Everything()).plan()
        compiled = compile_text(plan.text, [*plan.flags, "-DGENERATION=1ULL"])
        answer.send(sorted(variant.programs.keys() - compiled.functions.keys()))
    except Exception as error:
        answer.send(f"{error}")


@pytest.mark.parametrize("case", _cases(), ids=_name)
def test_compiles(
    case: tuple[Collector, Part, Variant], lacks: Callable[[str], NoReturn], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    monkeypatch.setattr(attach, "_KPROBE", Path("/"))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as words:
        child = context.Process(target=_compile, args=(case, theirs, words.fileno()))
        child.start()  # a compiler that crashes must not take the tests with it, and LLVM stays for good
        theirs.close()
        result = ours.recv() if ours.poll(60) else "it took more than 60 s"
        child.kill()
        child.join()
        ours.close()
        words.seek(0)
        assert result == [], first_error(words.read().decode(errors="replace"))
