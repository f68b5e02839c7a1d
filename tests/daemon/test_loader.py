# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

import collectors
from daemon import compiler, loader
from daemon.build import Request
from daemon.config import CollectorConfig
from daemon.errors import UnsupportedError

REQUEST = Request(
    collector=collectors.BY_NAME["runqlat"],
    options={"by": "none"},
    defines={"A": 1},
    bpffs=Path("/sys/fs/bpf/x"),
    group=0,
    forbidden=frozenset(),
    bcc="0.26.0",
    known=None,
    program_hash="",
)


def test_hash_is_stable_and_ignores_where_pins_lie() -> None:
    assert loader.program_hash(REQUEST) == loader.program_hash(replace(REQUEST, bpffs=Path("/sys/fs/bpf/y"), group=5))


@pytest.mark.parametrize(
    "change",
    [
        {"defines": {"A": 2}},
        {"defines": {}},
        {"bcc": "0.31.0"},
        {"forbidden": frozenset({"tp_btf"})},
        {"collector": replace(REQUEST.collector, symbols=("f",))},
        {"collector": replace(REQUEST.collector, constants=("e.F",))},
        {"collector": replace(REQUEST.collector, parts=REQUEST.collector.parts[:0])},
        {"collector": replace(REQUEST.collector, structs={})},
        {"collector": collectors.BY_NAME["oomkill"]},
    ],
)
def test_hash_follows_everything_that_decides_the_bytecode(change: dict[str, object]) -> None:
    assert loader.program_hash(replace(REQUEST, **change)) != loader.program_hash(REQUEST)


def test_exemplars_are_compiled_in_only_when_on() -> None:
    on = CollectorConfig({"by": "none"}, max_series=10, exemplars=True, exemplar_interval=2.5)
    off = replace(on, exemplars=False)
    without = loader.defines(REQUEST.collector, off)
    assert "EXEMPLAR_INTERVAL_NS" not in without
    assert loader.defines(REQUEST.collector, on) == {**without, "EXEMPLAR_INTERVAL_NS": 2_500_000_000}


def test_other_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    with pytest.raises(UnsupportedError, match="architecture sparc64 is not supported; bpfmetricsd runs on x86_64"):
        loader.preflight()


def test_kernel_without_btf_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "require_privileges", lambda: None)
    monkeypatch.setattr(loader, "BTF", tmp_path / "vmlinux")
    with pytest.raises(UnsupportedError, match="CONFIG_DEBUG_INFO_BTF=y"):
        loader.preflight()


def test_absent_bcc_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "require_privileges", lambda: None)
    monkeypatch.setattr(loader, "BTF", tmp_path)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="python3-bpfcc"):
        loader.preflight()


@pytest.mark.parametrize(
    ("effective", "enough"),
    [(0, False), (1 << 21, True), (1 << 39, False), (1 << 38, False), (1 << 38 | 1 << 39, True)],
)
def test_privileges_that_are_enough(effective: int, enough: bool) -> None:
    assert loader.may_load(f"Name:\tx\nCapEff:\t{effective:016x}\n") is enough
