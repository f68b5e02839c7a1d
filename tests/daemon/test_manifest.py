# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import manifest
from daemon.manifest import DamagedManifest, Manifest, MapShape, ProgramInfo

WHOLE = Manifest(
    collector="runqlat",
    program_hash="p",
    layout_hash="l",
    version="1",
    bcc="0.26.0",
    started=1.5,
    generation=7,
    options={"by": "none"},
    programs={"sched_switch": ProgramInfo("tp_btf:sched_switch", "a reason")},
    maps={"m": MapShape("array", 4, 8, 1, "u32", ["struct", "s", 8, {"a": [0, "u64"]}])},
    refused={"x": "y"},
    error="",
)


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    manifest.write(tmp_path / "new" / "folder", WHOLE)
    assert manifest.read(tmp_path / "new" / "folder", "runqlat") == WHOLE
    assert manifest.path(tmp_path / "new" / "folder", "runqlat").stat().st_mode & 0o777 == 0o644


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    manifest.write(tmp_path, WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["runqlat.json"]


def test_absent_is_none_and_removed_is_absent(tmp_path: Path) -> None:
    assert manifest.read(tmp_path, "runqlat") is None
    manifest.write(tmp_path, WHOLE)
    (tmp_path / ".runqlat.leftover").touch()
    manifest.remove(tmp_path, "runqlat")
    assert list(tmp_path.iterdir()) == []


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_damaged(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("state")
    manifest.path(folder, "x").write_bytes(content)
    with pytest.raises(DamagedManifest, match="run 'bpfmetricsd load' to write it again"):
        manifest.read(folder, "x")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner)
    )
)
def test_any_json_is_damaged(raw: object) -> None:
    with pytest.raises((KeyError, TypeError, AttributeError)):
        manifest.parse(raw)


def test_fidelity_follows_from_the_reason() -> None:
    assert ProgramInfo("h").fidelity == "exact"
    assert ProgramInfo("h", "why").fidelity == "approximate"
