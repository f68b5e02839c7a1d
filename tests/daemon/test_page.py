# SPDX-License-Identifier: Apache-2.0
"""The page for people, against a golden file, and with names that want to be markup."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from daemon import page
from daemon.model import Distribution, Family, Metric, Series

GOLDEN = Path(__file__).parents[1] / "golden"
EVIL = "<script>alert('&\"')</script>"
TIME = Metric("io_seconds", "histogram", "Time of a request.", ("device",), "seconds", (2.0**-20, 2.0**-10, 1.0))
SIZE = Metric("io_bytes", "histogram", "Size of a request.", (), "bytes", (1.0, 4096.0))
VOID = {"meta", "br", "hr", "img", "link", "input"}


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text


def status(**changes: Any) -> dict[str, Any]:
    programs = {
        "issue": {"hook": "tp_btf:block_rq_issue", "fidelity": "exact", "reason": None},
        "done": {"hook": "kprobe:done", "fidelity": "approximate", "reason": "merged requests count once"},
    }
    up = {"up": True, "error": None, "programs": programs, "lost": {"map_full": 3, "ring_full": 0}}
    return {
        "version": "0.1.0", "kernel": "6.1.0", "ready": True, "reasons": [], "notes": [],
        "collectors": {"biolatency": up, "oomkill": {"up": False, "error": "not loaded"}},
    } | changes  # fmt: skip


def families() -> list[Family]:
    return [
        Family(
            TIME, [Series(("vda",), Distribution((2, 5, 6), 6, 0.5)), Series(("vdb",), Distribution((0, 1, 1), 2, 9.0))]
        ),
        Family(SIZE, [Series((), Distribution((0, 0), 0, 0.0))]),
        Family(Metric("kills", "counter", "Kills."), [Series((), 5)]),
    ]


class Balanced(HTMLParser):
    """Raises where a tag is not closed in its turn; collects tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page() -> None:
    text = page.render(status(), families())
    Balanced(text)
    golden("page.html", text)


def test_nothing_of_it_comes_from_elsewhere_or_runs() -> None:
    found = Balanced(page.render(status(), families()))
    assert not found.tags & {"script", "img", "link", "iframe", "object", "form"}
    targets = [value for name, value in found.attributes if name in ("href", "src")]
    assert targets == ["/metrics", "/status", "/-/ready", "/-/healthy"]
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_everything_is_escaped() -> None:
    program = {"hook": EVIL, "fidelity": "approximate", "reason": EVIL}
    up = {"up": True, "error": None, "programs": {EVIL: program}, "lost": {EVIL: 1}}
    text = page.render(
        status(version=EVIL, kernel=EVIL, ready=False, reasons=[EVIL], notes=[EVIL], collectors={EVIL: up}),
        [Family(Metric(EVIL, "histogram", EVIL, (), EVIL, (1.0,)), [Series((), Distribution((1,), 1, 1.0))])],
    )
    assert "script" not in Balanced(text).tags
    assert "<script" not in text


def test_nothing_counted_and_not_well() -> None:
    text = page.render(status(ready=False, reasons=["oomkill: not loaded"]), [])
    assert "Not well." in text
    assert "<li>oomkill: not loaded</li>" in text
    assert "Nothing counted yet." in text


def test_amounts_have_the_unit_that_suits_them() -> None:
    seconds = [page._amount(value, "seconds") for value in (0.0, 2.0**-20, 31e-6, 2.0**-10, 0.25, 32.0, float("inf"))]
    assert seconds == ["0 µs", "0.95 µs", "31 µs", "0.98 ms", "250 ms", "32 s", "∞"]
    sizes = [page._amount(value, "bytes") for value in (1.0, 4096.0, 131072.0, 2.0**30)]
    assert sizes == ["1 B", "4 KiB", "128 KiB", "1 GiB"]
