# SPDX-License-Identifier: Apache-2.0
"""The table of `load`: what is found decides what is done. oomkill is quiet, runqlat always counts."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import collectors
from daemon import libbpf, loader, manifest, pins
from daemon.config import Config, parse
from daemon.declare import Collector
from daemon.engine import Engine
from daemon.errors import UnsupportedError

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).resolve().parents[2]


def configuration(folders: tuple[Path, Path], text: str) -> Config:
    options = {one.name: one.options for one in collectors.ALL}
    return replace(parse(f"collectors: {text}\n", "test", options), bpffs=folders[0], state=folders[1])


def load(config: Config, *, force: bool = False) -> tuple[dict[str, str], list[str]]:
    said: list[str] = []
    outcomes = loader.load(config, group=0, say=said.append, force=force)
    return {name: one.action for name, one in outcomes.items()}, said


def switches(config: Config) -> int:
    engine = Engine(config)
    (family,) = engine.decode("runqlat")
    engine.close()
    (series,) = family.series
    return series.value.count


def link_ids(config: Config, name: str) -> dict[str, str]:
    ids = {}
    for path in (config.bpffs / name / pins.LINKS).iterdir():
        descriptor = libbpf.obj_get(path)
        ids[path.name] = libbpf._fdinfo(descriptor)["link_id"]
        os.close(descriptor)
    return ids


def map_id(config: Config, name: str, which: str) -> int:
    descriptor, info = pins.open_map(config.bpffs / name / pins.MAPS / which)
    os.close(descriptor)
    return info.id


def test_loads_all_six_and_unload_leaves_nothing(folders: tuple[Path, Path]) -> None:
    everything = "{" + ", ".join(f"{one.name}: {{}}" for one in collectors.ALL) + "}"
    config = configuration(folders, everything)
    actions, said = load(config)
    assert actions == {one.name: "loaded" for one in collectors.ALL}
    assert said == []
    assert sorted(loader.unload(config)) == sorted(one.name for one in collectors.ALL)
    assert not config.bpffs.exists()
    assert not config.state.exists()


def test_second_load_does_nothing_and_never_imports_bcc(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{oomkill: {}}")
    load(config)
    before = link_ids(config, "oomkill")
    file = config.state.parent / "config.yaml"
    file.write_text(f"bpffs: {config.bpffs}\nstate: {config.state}\ncollectors: {{oomkill: {{}}}}\n")
    code = "import sys; from daemon import cli; cli.main(); print('bcc' in sys.modules)"
    again = [sys.executable, "-c", code, "load", "--config", str(file), "--user", "root"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].split()[:2] == ["oomkill", "kept"]
    assert done.stdout.splitlines()[-1] == "False"
    assert link_ids(config, "oomkill") == before


def test_other_program_same_layout_keeps_maps_and_counts(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{runqlat: {exemplar_interval: 10s}}")
    load(config)
    counted, maps, links = switches(config), map_id(config, "runqlat", "run_queue_all"), link_ids(config, "runqlat")
    started = manifest.read(config.state, "runqlat").started  # type: ignore[union-attr]
    other = configuration(folders, "{runqlat: {exemplar_interval: 20s}}")
    assert load(other)[0] == {"runqlat": "replaced"}
    assert switches(other) >= counted > 0
    assert map_id(other, "runqlat", "run_queue_all") == maps
    assert link_ids(other, "runqlat") != links
    assert manifest.read(other.state, "runqlat").started == started  # type: ignore[union-attr]
    subprocess.run(["sleep", "0.01"], check=True)
    assert switches(other) > counted


def test_other_layout_gets_new_maps_and_a_new_start(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{runqlat: {}}")
    load(config)
    maps = map_id(config, "runqlat", "run_queue_all")
    started = manifest.read(config.state, "runqlat").started  # type: ignore[union-attr]
    other = configuration(folders, "{runqlat: {exemplars: false}}")
    assert load(other)[0] == {"runqlat": "loaded"}
    assert map_id(other, "runqlat", "run_queue_all") != maps
    assert manifest.read(other.state, "runqlat").started > started  # type: ignore[union-attr]


def test_open_engine_follows_a_new_load(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{runqlat: {}}")
    load(config)
    engine = Engine(config)
    engine.collect()
    load(config, force=True)
    load(configuration(folders, "{runqlat: {exemplars: false}}"))
    engine.collect()
    assert engine.ready() == []
    engine.close()


def test_what_the_configuration_no_longer_names_is_unloaded(folders: tuple[Path, Path]) -> None:
    load(configuration(folders, "{runqlat: {}, oomkill: {}}"))
    config = configuration(folders, "{oomkill: {}}")
    assert load(config)[0] == {"runqlat": "unloaded", "oomkill": "kept"}
    assert pins.names(config.bpffs) == ["oomkill"]
    assert manifest.read(config.state, "runqlat") is None


def test_only_touches_the_named(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{runqlat: {}, oomkill: {}}")
    loader.load(config, 0, print, only=frozenset({"oomkill"}))
    assert pins.names(config.bpffs) == ["oomkill"]
    loader.load(config, 0, print)
    assert loader.unload(config, frozenset({"oomkill"})) == ["oomkill"]
    assert pins.names(config.bpffs) == ["runqlat"]


def test_missing_link_is_attached_again_to_the_same_maps(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{runqlat: {}}")
    load(config)
    counted = switches(config)
    (config.bpffs / "runqlat" / pins.LINKS / "sched_switch").unlink()
    engine = Engine(config)
    engine.collect()
    assert engine.ready() == ["runqlat: sched_switch detached; run 'bpfmetricsd load'"]
    engine.close()
    actions, said = load(config)
    assert actions == {"runqlat": "replaced"}
    assert "sched_switch is missing" in said[0]
    assert switches(config) >= counted


def test_map_of_another_type_in_a_pins_place_is_replaced(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{oomkill: {}}")
    load(config)
    maps = config.bpffs / "oomkill" / pins.MAPS
    (maps / "kills").unlink()
    descriptor, _ = pins.open_map(maps / "control", writable=True)
    libbpf.obj_pin(descriptor, maps / "kills")
    os.close(descriptor)
    engine = Engine(config)
    engine.collect()
    (reason,) = engine.ready()
    assert "kills is a array map of another shape" in reason
    engine.close()
    actions, said = load(config)
    assert actions == {"oomkill": "loaded"}
    assert "loading anew" in said[0]


def test_folder_without_manifest_is_cleared(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{oomkill: {}}")
    load(config)
    manifest.remove(config.state, "oomkill")
    actions, said = load(config)
    assert actions == {"oomkill": "loaded"}
    assert said == [f"oomkill: {config.bpffs}/oomkill holds pins that no manifest speaks of; loading anew"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 99}', "\x00", '{"format": 1, "programs": 3}'])
def test_damaged_manifest_is_written_anew(folders: tuple[Path, Path], damage: str) -> None:
    config = configuration(folders, "{oomkill: {}}")
    load(config)
    path = manifest.path(config.state, "oomkill")
    path.write_text(damage)
    engine = Engine(config)
    engine.collect()
    assert "run 'bpfmetricsd load'" in engine.ready()[0]
    engine.close()
    actions, said = load(config)
    assert actions == {"oomkill": "loaded"}
    assert str(path) in said[0]


def test_half_written_state_is_swept_away(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, "{oomkill: {}}")
    load(config)
    leftover = config.bpffs / f"oomkill{pins.STAGING}"
    leftover.mkdir()
    (leftover / pins.MAPS).mkdir()
    assert load(config)[0] == {"oomkill": "kept"}
    assert pins.names(config.bpffs) == ["oomkill"]


def test_programs_that_were_not_handed_over_are_attached_again(folders: tuple[Path, Path]) -> None:
    """A loader that dies between the handover and the manifest leaves programs of another generation."""
    config = configuration(folders, "{runqlat: {}}")
    load(config)
    counted = switches(config)
    descriptor, _ = pins.open_map(config.bpffs / "runqlat" / pins.MAPS / pins.CONTROL, writable=True)
    libbpf.map_update(descriptor, bytes(4), (12345).to_bytes(8, "little"))
    os.close(descriptor)
    frozen = switches(config)
    assert switches(config) == frozen
    actions, said = load(config)
    assert actions == {"runqlat": "replaced"}
    assert "another generation" in said[0]
    assert switches(config) >= frozen >= counted


def with_field(collector: Collector, field: str) -> Collector:
    return replace(collector, structs={**collector.structs, "task_struct": (field,)})


def test_collector_that_cannot_load_leaves_the_others_up(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = with_field(collectors.BY_NAME["runqlat"], "no_such_field")
    monkeypatch.setitem(collectors.BY_NAME, "runqlat", broken)
    config = configuration(folders, "{runqlat: {}, oomkill: {}}")
    outcomes = loader.load(config, 0, print)
    assert outcomes["oomkill"].action == "loaded"
    assert outcomes["runqlat"].action == "failed"
    assert "task_struct.no_such_field" in outcomes["runqlat"].detail
    engine = Engine(config)
    up = {
        series.labels: series.value
        for family in engine.collect()
        if family.metric.name == "bpfmetricsd_collector_up"
        for series in family.series
    }
    assert up == {("runqlat",): 0, ("oomkill",): 1}
    (reason,) = engine.ready()
    assert reason.startswith("runqlat: this kernel has no task_struct.no_such_field")
    assert engine.status()["collectors"]["runqlat"]["error"] == reason.removeprefix("runqlat: ")
    engine.close()


def test_failed_load_keeps_what_was_loaded_before(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(folders, "{runqlat: {}}")
    load(config)
    counted = switches(config)
    monkeypatch.setitem(collectors.BY_NAME, "runqlat", with_field(collectors.BY_NAME["runqlat"], "no_such_field"))
    assert load(config)[0] == {"runqlat": "failed"}
    assert switches(config) >= counted
    engine = Engine(config)
    engine.collect()
    assert "no_such_field" in engine.ready()[0]
    engine.close()
    monkeypatch.undo()
    assert load(config)[0] == {"runqlat": "replaced"}
    assert switches(config) >= counted


@pytest.mark.parametrize("kind", ["tp_btf", "raw_tp"])
def test_no_hook_left_is_an_error_with_the_reasons(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(loader.FORBID, "tp_btf,raw_tp")
    outcomes = loader.load(configuration(folders, "{oomkill: {}}"), 0, print)
    assert outcomes["oomkill"].action == "failed"
    assert f"{kind}:signal_generate: forbidden by BPFMETRICSD_FORBID" in outcomes["oomkill"].detail


def test_program_that_does_not_compile_names_the_line(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = collectors.BY_NAME["runqlat"]
    monkeypatch.setitem(collectors.BY_NAME, "runqlat", replace(original, defines=lambda options: {"wait_ns": "1 +"}))
    outcome = loader.load(configuration(folders, "{runqlat: {}}"), 0, print)["runqlat"]
    assert outcome.action == "failed"
    assert "runqlat.bpf.c:" in outcome.detail
    assert "error:" in outcome.detail


def test_bpffs_below_a_foreign_file_system_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = replace(configuration(folders, "{oomkill: {}}"), bpffs=tmp_path / "pins")
    with pytest.raises(UnsupportedError, match="is not a BPF file system"):
        load(config)
    assert list(tmp_path.iterdir()) == []


def children() -> set[str]:
    """Processes whose parent is this one, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(stat.parent.name)
    return found


def test_cold_load_leaves_no_process(folders: tuple[Path, Path]) -> None:
    before = children()
    load(configuration(folders, "{runqlat: {}, oomkill: {}}"))
    assert children() <= before
