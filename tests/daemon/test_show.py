# SPDX-License-Identifier: Apache-2.0
"""What the terminal shows, against golden files and literals."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from daemon import show
from daemon.errors import UsageError
from daemon.histogram import BYTES, SECONDS, Scale
from daemon.model import Distribution, Exemplar, Family, Metric, Series
from daemon.show import View

GOLDEN = Path(__file__).parents[1] / "golden"
LABELS = ("device", "operation")
TIME = Metric("io_seconds", "histogram", "Time of a request.", LABELS, "seconds", SECONDS.bounds)
SIZE = Metric("io_bytes", "histogram", "Size of a request.", LABELS, "bytes", BYTES.bounds)
ERRORS = Metric("io_errors", "counter", "Requests that failed.", (*LABELS, "error"))
MEMINFO = "MemTotal:  8000000 kB\nBuffers:    102400 kB\nCached:    2048000 kB\nHugePages_Total:   0\n"


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text


def times(*values_ns: int) -> Distribution:
    return filled(values_ns, SECONDS)


def sizes(*values: int) -> Distribution:
    return filled(values, BYTES)


def filled(values: Sequence[int], scale: Scale) -> Distribution:
    slots, overflow = [0] * scale.slots, 0
    for value in values:
        slot = scale.slot(value)
        if slot < scale.slots:
            slots[slot] += 1
        else:
            overflow += 1
    return scale.distribution(slots, overflow, sum(values))


def io() -> list[Family]:
    reads = [700] + [9_000] * 7 + [20_000] * 100 + [45_000] * 33 + [900_000] * 2
    return [
        Family(TIME, [Series(("vda", "read"), times(*reads)), Series(("vdb", "write"), times(3_000_000))]),
        Family(SIZE, [Series(("vda", "read"), sizes(*[4096] * 143)), Series(("vdb", "write"), sizes(1 << 17))]),
        Family(ERRORS, [Series(("vda", "read", "medium"), 3), Series(("vdb", "write", "timeout"), 12),
                        Series(("vdb", "read", "ioerr"), 0)]),
    ]  # fmt: skip


def rendered(families: Sequence[Family], view: View | None = None) -> str:
    return "\n".join(show.render(families, families, view or View())) + "\n"


def bars(metric: Metric, value: Distribution) -> list[str]:
    return show.bars(metric, value, show.scale(metric, value))


def test_a_collector_as_bcc_prints_it() -> None:
    golden("show.txt", rendered(io()))


def test_a_histogram_for_each_value_of_a_label() -> None:
    golden("show_by_device.txt", rendered(io(), View(by="device")))


def test_one_histogram_alone_needs_no_title() -> None:
    assert rendered(io()[:1]).startswith("     usecs               : count     distribution\n")


def test_rows_are_the_bounds_and_stars_their_share() -> None:
    lines = bars(TIME, times(900, 1_500, 1_600))
    assert lines == [
        "     usecs               : count     distribution",
        f"         0 -> 0.95       : 1        |{'*' * 20}                    |",
        f"      0.95 -> 1.9        : 2        |{'*' * 40}|",
        "",
        "avg = 1.3 usecs, total: 4 usecs, count: 3",
    ]


def test_milliseconds_where_nothing_is_faster() -> None:
    lines = bars(TIME, times(1_500_000, 40_000_000))
    assert lines[0] == "     msecs               : count     distribution"
    assert [line.split(":")[0].strip() for line in lines[1:8]] == [
        "0 -> 0.98", "0.98 -> 2", "2 -> 3.9", "3.9 -> 7.8", "7.8 -> 16", "16 -> 31", "31 -> 62",
    ]  # fmt: skip


def test_rows_of_bytes_name_whole_bytes_at_both_ends_and_begin_where_something_is() -> None:
    lines = bars(SIZE, sizes(4096, 4097))
    assert [line.split(" :")[0].strip() for line in lines[1:3]] == ["2049 -> 4096", "4097 -> 8192"]
    assert bars(SIZE, sizes(0, 2))[1:3] == [
        f"         0 -> 1          : 1        |{'*' * 40}|",
        f"         2 -> 2          : 1        |{'*' * 40}|",
    ]


def test_what_is_above_all_bounds_has_a_row() -> None:
    assert "  32000000 -> +Inf       : 1        |" in "\n".join(bars(TIME, times(100, 60 * 10**9)))


def test_the_unit_comes_from_the_totals() -> None:
    slow = [Family(TIME, [Series(("vda", "read"), times(3_000_000))])]
    both = [Family(TIME, [Series(("vda", "read"), times(3_000_000, 50))])]
    assert "msecs" in "\n".join(show.render(slow, slow, View()))
    assert "usecs" in "\n".join(show.render(slow, both, View()))


def test_difference_is_what_came_in_between() -> None:
    metric = replace(TIME, labels=())
    before = [Family(metric, [Series((), times(100, 200), 5.0)]), Family(ERRORS, [Series(("a", "b", "c"), 7, 5.0)])]
    after = [Family(metric, [Series((), times(100, 200, 300), 5.0)]), Family(ERRORS, [Series(("a", "b", "c"), 9, 5.0)])]
    came = show.difference(after, before)
    value = came[0].series[0].value
    assert isinstance(value, Distribution)
    assert (value.count, round(value.sum * 1e9)) == (1, 300)
    assert came[1].series[0].value == 2


def test_a_series_that_is_new_or_began_again_counts_whole() -> None:
    before = [Family(ERRORS, [Series(("a", "b", "c"), 7, 5.0)])]
    after = [Family(ERRORS, [Series(("a", "b", "c"), 2, 8.0), Series(("x", "b", "c"), 1, 8.0)])]
    assert [series.value for series in show.difference(after, before)[0].series] == [2, 1]


def test_a_counter_is_a_table_with_the_most_first() -> None:
    assert show.table(io()[2], View(seconds=2)) == [
        "DEVICE  OPERATION  ERROR    COUNT  PER_SECOND",
        "vdb     write      timeout     12         6.0",
        "vda     read       medium       3         1.5",
    ]
    assert show.table(io()[2], View(by="operation")) == ["OPERATION  COUNT", "write         12", "read           3"]


def test_control_characters_of_labels_do_not_reach_the_terminal() -> None:
    family = Family(ERRORS, [Series(("\033[2Jvda", "read", "ioerr"), 1)])
    assert "\033" not in "\n".join(show.table(family, View()))
    histogram = Family(TIME, [Series(("\033[2Jvda", "read"), times(1))])
    assert "device = \\x1b[2Jvda" in show.render([histogram], [histogram], View(by="device"))


def test_nothing_counted() -> None:
    assert rendered([Family(TIME, []), Family(ERRORS, [])]) == "     nothing counted\n"


def test_a_family_that_counted_nothing_takes_no_line() -> None:
    errors = Family(ERRORS, [Series(("vdb", "read", "ioerr"), 1)])
    assert rendered([Family(TIME, []), errors]).startswith("\nRequests that failed.\n")


def test_a_table_tells_whom_the_last_of_each_met() -> None:
    def seen(comm: str, when: float) -> Exemplar:
        ends = (("laddr", "10.0.0.1"), ("lport", "22"), ("raddr", "10.0.0.2"), ("rport", "5000"))
        return Exemplar((("pid", "7"), ("comm", comm), *ends), 1, when)

    family = Family(ERRORS, [
        Series(("vda", "read", "medium"), 3, 1.0, seen("old", 5.0)),
        Series(("vdb", "read", "ioerr"), 4, 1.0, seen("\033[2Jnew", 9.0)),
        Series(("vdb", "write", "ioerr"), 1, 1.0),
    ])  # fmt: skip
    assert show.table(family, View(by="operation")) == [
        "OPERATION  COUNT  LAST",
        "read           7  \\x1b[2Jnew (pid 7), 10.0.0.1:22 to 10.0.0.2:5000",
        "write          1",
    ]


def test_an_unknown_label_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--by disk: no such label; known: device, error, operation"):
        rendered(io(), View(by="disk"))
    with pytest.raises(UsageError, match="has none"):
        show.check_label([Family(replace(TIME, labels=()), [])], "cgroup")


def pages(accesses: int, misses: int, dirtied: int, added: int) -> list[Family]:
    counts = {"accesses": accesses, "misses": misses, "dirtied": dirtied, "added": added}
    return [
        Family(Metric(f"bpf_page_cache_{name}", "counter", "Pages."), [Series((), count, 1000.0)])
        for name, count in counts.items()
    ]


def test_cachestat_in_its_own_columns() -> None:
    lines = [show.cachestat_header(timed=False), show.cachestat(pages(1132, 3, 4, 9), MEMINFO)]
    assert lines == [
        "    HITS   MISSES  DIRTIES HITRATIO   BUFFERS_MB  CACHED_MB    ADDED",
        "    1129        3        4   99.73%          100       2000        9",
    ]
    assert show.cachestat_header(timed=True).startswith("TIME         HITS")
    nothing = show.cachestat(pages(0, 0, 0, 0), MEMINFO, "12:00:00")
    assert nothing.startswith("12:00:00        0        0        0    0.00%")


def watched(readings: list[list[Family]], view: View, count: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    said: list[str] = []
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    show.watch(lambda: readings.pop(0), view, count, said.append)
    assert len(slept) == (count or 0)
    return "\n".join(said)


def test_watch_without_an_interval_shows_all_since_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    began = [replace(family, series=[replace(one, created=1000.0) for one in family.series]) for family in io()]
    text = watched([began], View(), None, monkeypatch)
    assert re.match(r"Since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n\nTime of a request\.\n", text)


def test_watch_shows_each_interval_below_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = replace(TIME, labels=())
    readings = [[Family(metric, [Series((), times(*[100] * count), 1.0)])] for count in (5, 6, 9)]
    text = watched(readings, View(seconds=1), 2, monkeypatch)
    assert re.findall(r"\n\d\d:\d\d:\d\d\n", text) != []
    assert re.findall(r"count: (\d+)", text) == ["1", "3"]


def test_watch_of_cachestat_is_one_line_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = watched([pages(1, 1, 1, 1), pages(5, 1, 1, 1)], View(seconds=1), 1, monkeypatch).splitlines()
    assert len(lines) == 2
    assert re.match(r"\d\d:\d\d:\d\d        4        0        0  100.00%", lines[1])
