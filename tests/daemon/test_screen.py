# SPDX-License-Identifier: Apache-2.0
"""What `status`, `check` and `list` print, against a golden file and literals."""

from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path
from typing import Any

from daemon import screen, words
from daemon.attach import Plan
from daemon.declare import Hook, Variant

GOLDEN = Path(__file__).parents[1] / "golden"
DARK = screen.Style(on=False)


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text


def use(entries: int | None, max_entries: int, memory_bytes: int) -> dict[str, Any]:
    return {"entries": entries, "max_entries": max_entries, "memory_bytes": memory_bytes}


def program(hook: str, reason: str | None = None, runs: int = 0, run_time_ns: int = 0) -> dict[str, Any]:
    return {"hook": hook, "reason": reason, "runs": runs, "run_time_ns": run_time_ns}


def found(**changes: Any) -> dict[str, Any]:
    well = {
        "up": True, "error": None, "started": 1000.0, "series_dropped": 0, "lost": {"map_full": 0, "ring_full": 0},
        "programs": {"issue": program("tp_btf:block_rq_issue"), "done": program("tp_btf:block_rq_complete")},
        "maps": {"disks": use(2, 64, 5 << 20), "inflight": use(8000, 16384, 200_000), "block_io": use(None, 5, 4096)},
    }  # fmt: skip
    reason = "readahead is seen late"
    stale = {
        "up": True, "error": "the last load failed", "started": 90_000.0, "series_dropped": 4,
        "lost": {"map_full": 3, "recursion": 2}, "maps": {"pages": use(None, 4, 1600)},
        "programs": {name: program(f"kprobe:{name}", reason) for name in ("filemap_fault", "filemap_read")},
    }  # fmt: skip
    down = {"up": False, "error": "not loaded", "reading_seconds": 0.0}
    return {
        "collectors": {"biolatency": well, "cachestat": stale, "oomkill": down}, "ready": False,
        "reasons": ["cachestat: the last load failed", "oomkill: not loaded"], "notes": ["keeps CAP_BPF"],
        "bpf_stats_enabled": False,
    } | changes  # fmt: skip


def test_status_screen() -> None:
    golden("status.txt", "\n".join(screen.status(found(), 100_000.0, DARK)) + "\n")


def test_status_when_all_is_well_and_the_cost_is_known() -> None:
    one = found()["collectors"]["biolatency"]
    one["programs"]["issue"] |= {"runs": 100, "run_time_ns": 20_000}
    one["programs"]["done"] |= {"runs": 100, "run_time_ns": 40_000}
    lines = screen.status(found(collectors={"biolatency": one}, ready=True, reasons=[], notes=[]), 1000.0, DARK)
    assert lines[0] == "all is well: 1 of 1 collectors up, 5.2 MiB of kernel memory, no events lost"
    assert re.search(r"NS/RUN.*\n.* 300 ", "\n".join(lines))
    assert len(lines) == 4


def test_what_is_not_seen_is_told_once_it_is_more_than_a_hundredth() -> None:
    one = found()["collectors"]["biolatency"]

    def told(coverage: float | None) -> bool:
        every = {"biolatency": one | {"coverage": coverage}}
        lines = screen.status(found(collectors=every), 1000.0, DARK)
        return "biolatency counts 98.0 % of what the kernel counts of the same" in lines

    assert [told(coverage) for coverage in (None, 1.0, 0.995, 0.98)] == [False, False, False, True]


def test_colours_only_on_a_terminal_and_not_where_nobody_wants_them() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    assert screen.style(Terminal(), {}).bold("x") == "\033[1mx\033[0m"
    assert screen.style(Terminal(), {"NO_COLOR": "1"}).bold("x") == "x"
    assert screen.style(Terminal(), {"TERM": "dumb"}).bad("x") == "x"
    assert screen.style(StringIO(), {}).good("x") == "x"
    assert screen.style(None, {}).good("x") == "x"


def test_check_tells_hooks_fidelity_and_what_was_passed_over() -> None:
    exact = Variant({"issue": Hook("tp_btf", "block_rq_issue")})
    rough = Variant({"read_entry": Hook("kprobe", "filemap_read")}, approximate="readahead is seen late")
    refused = {"b tp_btf:mm_filemap_get_pages": "this kernel has no such tracepoint"}
    plan = Plan({"a": exact, "b": rough}, refused, "", ())
    assert screen.check("cachestat", plan, DARK) == [
        "cachestat: approximate",
        "  issue       tp_btf:block_rq_issue",
        "  read_entry  kprobe:filemap_read",
        "  approximate: readahead is seen late",
        "  passed over: b tp_btf:mm_filemap_get_pages: this kernel has no such tracepoint",
    ]
    assert screen.check("x", Plan({"a": exact}, {}, "", ()), DARK)[0] == "x: exact"


def test_small_words() -> None:
    assert [words.age(seconds) for seconds in (-1, 0, 59, 60, 3725, 90_000)] == [
        "0 s", "0 s", "59 s", "1 min", "1 h 2 min", "1 d 1 h",
    ]  # fmt: skip
    assert [screen.size(number) for number in (0, 1023, 1024, 200 << 10, 5 << 20, 3 << 30)] == [
        "0 B", "1023 B", "1.0 KiB", "200 KiB", "5.0 MiB", "3.0 GiB",
    ]  # fmt: skip
