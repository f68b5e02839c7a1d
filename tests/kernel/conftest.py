# SPDX-License-Identifier: Apache-2.0
"""Real BPF on this machine: each test loads its collector into folders of its own, and removes them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import collectors
from daemon import loader
from daemon.config import Config, parse
from daemon.declare import Event
from daemon.engine import Engine
from daemon.errors import UnsupportedError
from daemon.model import Family


@dataclass
class Loaded:
    """A loaded collector; `read()` gives its families by name, as a scrape would see them."""

    name: str
    config: Config
    outcome: loader.Outcome
    engine: Engine
    events: list[Event]

    def read(self) -> dict[str, Family]:
        return {family.metric.name: family for family in self.engine.decode(self.name)}

    def series(self, metric: str) -> dict[tuple[str, ...], Any]:
        """Label values to value."""
        return {series.labels: series.value for series in self.read()[metric].series}

    def losses(self) -> dict[str, int]:
        self.read()
        return self.engine.status()["collectors"][self.name]["lost"]


Load = Callable[..., Loaded]


@contextmanager
def _folders(lacks: Callable[[str], object]) -> Iterator[tuple[Path, Path]]:
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    with tempfile.TemporaryDirectory(prefix="bpfmetricsd_test_") as folder:
        Path(folder).chmod(0o755)
        bpffs, state = Path("/sys/fs/bpf", Path(folder).name), Path(folder, "state")
        yield bpffs, state
        loader.unload(Config(collectors={}, bpffs=bpffs, state=state))
        assert not bpffs.exists()


@contextmanager
def _loading(bpffs: Path, state: Path) -> Iterator[Load]:
    engines: list[Engine] = []

    def do(name: str, forbid: str = "", **options: Any) -> Loaded:
        text = f"collectors:\n  {name}: {{{', '.join(f'{key}: {value}' for key, value in options.items())}}}\n"
        config = parse(text, "test", {one.name: one.options for one in collectors.ALL})
        config = replace(config, bpffs=bpffs, state=state)
        os.environ[loader.FORBID] = forbid
        try:
            outcome = loader.load(config, group=0, say=print)[name]
        finally:
            del os.environ[loader.FORBID]
        assert outcome.action != "failed", outcome.detail
        events: list[Event] = []
        engine = Engine(config, events.append)
        engines.append(engine)
        return Loaded(name, config, outcome, engine, events)

    yield do
    for engine in engines:
        engine.close()


@pytest.fixture
def folders(lacks: Callable[[str], object]) -> Iterator[tuple[Path, Path]]:
    """A folder for pins and one for manifests, which a server without privilege can reach; gone afterwards."""
    with _folders(lacks) as found:
        yield found


@pytest.fixture
def load(folders: tuple[Path, Path]) -> Iterator[Load]:
    """`load("biolatency", max_devices=2)`: loads with these options and opens the pins."""
    with _loading(*folders) as do:
        yield do


@pytest.fixture(scope="module")
def shared(lacks: Callable[[str], object]) -> Iterator[Load]:
    """As `load`, but what a test of the same module loaded with the same options is there already, and has counted.

    Most of the time of a small test goes into the compiler, in an emulated machine above all.
    """
    with ExitStack() as undo:

        @cache
        def once(name: str, forbid: str, options: str) -> Loaded:
            do = undo.enter_context(_loading(*undo.enter_context(_folders(lacks))))
            return do(name, forbid, **json.loads(options))

        yield lambda name, forbid="", **options: once(name, forbid, json.dumps(options, sort_keys=True))
