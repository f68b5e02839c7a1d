# SPDX-License-Identifier: Apache-2.0
"""The page of accuracy is made from the tests' results, and only from them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import collectors
from tests import accuracy
from tests.accuracy import PAGE, STORE, Row

ROW = Row("runqlat", "6.12.9-amd64", "tp_btf:sched_switch", "exact", "waits", 2, 999.0, 1000.0, -0.002)


def test_page_is_current() -> None:
    """`make accuracy` writes it; no number in it is typed by hand."""
    assert accuracy.page(accuracy.parse(STORE.read_text())) == PAGE.read_text()


def test_every_collector_has_been_compared() -> None:
    assert {row.collector for row in accuracy.parse(STORE.read_text())} == {one.name for one in collectors.ALL}


def test_what_calls_itself_exact_is() -> None:
    """But for what the docstring of a test allows: times of two clocks, read one after the other."""
    for row in accuracy.parse(STORE.read_text()):
        if row.fidelity == "exact":
            assert abs(row.worst) <= (0.02 if row.what.endswith("seconds") else 0.001), row


def test_line() -> None:
    line = accuracy.page([ROW]).splitlines()[-1]
    assert line == (
        "| 6.12.9-amd64 | tp_btf:sched_switch | exact | waits | 999 | 1,000 | 0.999000 | -0.200 % | 2 |"
    )  # fmt: skip


def test_new_results_replace_those_of_the_same_series_and_collector() -> None:
    other, older = replace(ROW, collector="tcplife"), replace(ROW, kernel="6.12.1-amd64", what="gone")
    elsewhere = replace(ROW, kernel="6.1.9-amd64")
    assert accuracy.merge([other, older, elsewhere], [ROW]) == sorted([other, elsewhere, ROW])


def test_comparisons_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_rows", {})
    programs = {"a": {"hook": "tp_btf:x", "fidelity": "exact"}, "b": {"hook": "tp_btf:x", "fidelity": "approximate"}}
    engine = SimpleNamespace(status=lambda: {"collectors": {"oomkill": {"programs": programs}}})
    loaded = SimpleNamespace(name="oomkill", engine=engine)
    for counted, true in ((10, 10), (9, 10), (0, 0)):
        accuracy.compared(loaded, "kills", counted, true)
    (row,) = accuracy._rows.values()
    assert (row.hooks, row.fidelity) == ("tp_btf:x", "approximate")
    assert (row.comparisons, row.counted, row.true) == (3, 19, 20)
    assert row.worst == pytest.approx(-0.1)
    assert accuracy.parse(accuracy.dump([row])) == [row]
    assert json.loads(accuracy.dump([row]))[0]["what"] == "kills"
