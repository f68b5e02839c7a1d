# SPDX-License-Identifier: Apache-2.0
"""The server's source: what it tells systemd, and what a configuration read again asks of a person."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from daemon import service
from daemon.app import Source
from daemon.commands import read_config
from daemon.config import CollectorConfig, Config, Listen, ServerConfig
from daemon.engine import Engine
from daemon.errors import UsageError
from daemon.model import Family
from daemon.service import Service

LOADED, EDITED = 2_000, 1_000


def config(**collectors: CollectorConfig) -> Config:
    return Config(collectors=collectors)


PLAIN = CollectorConfig(MappingProxyType({"by": "none"}))
BEFORE = config(runqlat=PLAIN, oomkill=PLAIN)


def test_what_only_a_restart_changes() -> None:
    began = Config()
    assert service.must_restart(began, began) == []
    other = Config(
        ServerConfig((Listen("::1", 1),), Path("/w")), interval=1.0, bpffs=Path("/b"), state=Path("/s"), journal=False
    )
    assert service.must_restart(began, other) == [
        "server.listen", "server.web_config", "interval", "journal", "bpffs", "state",
    ]  # fmt: skip


def must_load(after: Config, **written_ns: int) -> list[str]:
    return service.must_load(BEFORE, after, {"runqlat": 1, "oomkill": 1} | written_ns, EDITED)


def test_options_and_exemplars_are_compiled_in() -> None:
    for changed in (
        replace(PLAIN, options={"by": "cgroup"}),
        replace(PLAIN, exemplars=False),
        replace(PLAIN, exemplar_interval=99.0),
    ):
        assert must_load(config(runqlat=changed, oomkill=PLAIN)) == ["runqlat"]
        assert must_load(config(runqlat=changed, oomkill=PLAIN), runqlat=LOADED) == []


def test_max_series_is_in_force_at_once() -> None:
    assert must_load(config(runqlat=replace(PLAIN, max_series=10), oomkill=PLAIN)) == []


def test_the_interval_of_exemplars_that_are_off_does_not_matter() -> None:
    off = replace(PLAIN, exemplars=False)
    after = config(runqlat=replace(off, exemplar_interval=99.0))
    assert service.must_load(config(runqlat=off), after, {"runqlat": 1}, EDITED) == []


def test_new_and_removed_collectors() -> None:
    assert must_load(config(runqlat=PLAIN, oomkill=PLAIN, tcplife=PLAIN), tcplife=0) == ["tcplife"]
    assert must_load(config(runqlat=PLAIN, oomkill=PLAIN, tcplife=PLAIN), tcplife=LOADED) == []
    assert must_load(config(runqlat=PLAIN)) == ["oomkill"]
    assert must_load(config(runqlat=PLAIN), oomkill=0) == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    folders = f"state: {tmp_path / 'state'}\nbpffs: {tmp_path / 'bpffs'}\n"
    file.write_text(f"{folders}collectors: {{runqlat: {{}}, oomkill: {{}}}}\n")
    return file


@pytest.fixture
def source(path: Path) -> Iterator[Service]:
    found = read_config(path)
    made = Service(path, read_config, found, found.bpffs, ["a note"])
    yield made
    made.close()


def edit(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after))


def test_it_is_what_the_server_wants(source: Service) -> None:
    taken: Source = source
    assert taken.names() == {"runqlat", "oomkill"}


def test_tick_says_how_all_is(source: Service) -> None:
    line = source.tick()
    assert line.startswith("0 of 2 collectors up; runqlat: ")
    assert "bpfmetricsd load" in line
    assert line.endswith("; a note")
    assert len(source.ready()) == 2


def test_tick_counts_those_that_are_up(source: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "up", lambda engine: {"runqlat": True, "oomkill": False})
    assert source.tick().startswith("1 of 2 collectors up; ")


def test_tick_reads_only_when_nobody_has_scraped(source: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[frozenset[str] | None] = []

    def collect(names: frozenset[str] | None) -> list[Family]:
        calls.append(names)
        return []

    monkeypatch.setattr(source._engine, "collect", collect)
    source.tick()
    source.tick()
    source.collect(frozenset({"runqlat"}))
    assert calls == [None, frozenset({"runqlat"})]


def test_status_and_page(source: Service, path: Path) -> None:
    found = json.loads(json.dumps(source.status()))
    assert list(found) == [
        "version", "kernel", "bpffs", "collectors", "ready", "reasons", "notes", "bpf_stats_enabled",
    ]  # fmt: skip
    assert found["bpffs"] == str(path.parent / "bpffs")
    assert (found["ready"], found["notes"], len(found["reasons"])) == (False, ["a note"], 2)
    assert '<li class="dim">a note</li>' in source.page()


def test_reload_says_what_else_is_to_do(source: Service, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert source.reload() == "configuration read again: 2 collectors; run 'bpfmetricsd load' for runqlat, oomkill"
    edit(path, "oomkill: {}", "tcplife: {}")
    edit(path, "collectors:", "interval: 9s\ncollectors:")
    line = source.reload()
    assert line.endswith("for runqlat, tcplife; restart bpfmetricsd to put interval in force")
    assert line in caplog.text
    assert source.names() == {"runqlat", "tcplife"}
    assert source.tick().endswith("; a note; restart bpfmetricsd to put interval in force")
    edit(path, "interval: 9s\n", "")
    assert "restart" not in source.reload()
    assert "restart" not in source.tick()


def test_a_bad_file_changes_nothing(source: Service, path: Path) -> None:
    edit(path, "runqlat", "runqlatt")
    with pytest.raises(UsageError, match="did you mean runqlat"):
        source.reload()
    assert source.names() == {"runqlat", "oomkill"}


def test_a_folder_of_pins_that_was_replaced_needs_a_restart(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bpffs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    source = Service(path, read_config, read_config(path), Path("."))
    assert not any("restart" in reason for reason in source.ready())
    os.rmdir(folder)
    folder.mkdir()
    assert any("restart bpfmetricsd" in reason for reason in source.ready())
    assert source.status()["ready"] is False
    source.close()
