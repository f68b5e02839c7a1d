# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from collectors.tcpretrans import COLLECTOR
from daemon import coverage
from daemon.declare import Collector, Row, Tables, Truth


def with_truth(*files: Path | str) -> Collector:
    """Its kernel's count is a number in the first file; it says nothing while that holds a minus."""

    def counted(began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> tuple[int, int] | None:
        before, after = (int(texts[str(files[0])]) for texts in (began, now))
        return None if after < 0 else (tables["events"][0].value, after - before)

    return replace(COLLECTOR, truth=Truth(tuple(map(str, files)), counted, enough=100))


def test_texts_of_files_and_of_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("5\n")
    (tmp_path / "link").symlink_to("net:[4026531840]")
    paths = [tmp_path / name for name in ("file", "link", "absent")]
    assert coverage.texts(with_truth(*paths)) == {str(paths[0]): "5\n", str(paths[1]): "net:[4026531840]"}
    assert coverage.texts(replace(COLLECTOR, truth=None)) == {}


@pytest.mark.parametrize(
    ("began", "now", "ratio"),
    [
        ({"a": "0"}, {"a": "20000"}, 0.75),
        ({"a": "10000"}, {"a": "30000"}, 0.75),
        ({"a": "0"}, {"a": "99"}, 1.0),
        ({"a": "0"}, {"a": "-1"}, None),
        ({}, {"a": "20000"}, None),
        ({"a": "0"}, {}, None),
    ],
    ids=["ratio", "since the beginning", "not enough yet", "not comparable", "no account then", "no account now"],
)
def test_ratio(began: dict[str, str], now: dict[str, str], ratio: float | None) -> None:
    assert coverage.ratio(with_truth("a"), began, now, {"events": [Row(0, 15_000)]}) == ratio


@pytest.mark.parametrize("unit", ["bpfmetricsd-load.service", "bpfmetricsd.service"])
def test_loader_and_server_are_in_the_hosts_network_namespace(unit: str) -> None:
    text = (Path(__file__).parents[2] / "packaging/systemd" / unit).read_text()
    options = {line.partition("=")[0] for line in text.splitlines()}
    assert options.isdisjoint({"PrivateNetwork", "NetworkNamespacePath", "JoinsNamespaceOf"})


def test_no_ratio_without_an_account() -> None:
    assert coverage.ratio(replace(COLLECTOR, truth=None), {}, {}, {}) is None
