# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests compared with the kernel's own account, kept, and written as docs/accuracy.md.

    python -m tests.accuracy RESULTS...     takes files of results into docs/accuracy.json and writes the page

A test that compares calls `compared`. Where BPFMETRICSD_ACCURACY names a folder, the run leaves there one file for its
kernel. `make accuracy` does all this, on this kernel and in the guests.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "BPFMETRICSD_ACCURACY"
DOCS = Path(__file__).resolve().parent.parent / "docs"
STORE, PAGE = DOCS / "accuracy.json", DOCS / "accuracy.md"

_HEAD = """\
# Accuracy

What the collectors counted, beside what the kernel itself counted of the same events. Each line sums up comparisons
that the tests under `tests/kernel` made: `counted` and `true` are their sums, `worst` is the comparison that differed
most. `make accuracy` makes them anew, on the kernel that runs and in guests with other kernels, and writes this page.

Some sandboxes run no BPF program for some events; a load during which that happened is not compared.
An approximate hook says so in the metric `bpfmetricsd_collector_hook_info`, and why in `bpfmetricsd status`.
"""


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One collector on one kernel with one set of hooks, and what was compared: sums over all comparisons."""

    collector: str
    kernel: str
    hooks: str
    fidelity: str
    what: str
    comparisons: int
    counted: float
    true: float
    worst: float  # relative, signed

    def plus(self, other: Row) -> Row:
        return Row(
            *(self.collector, self.kernel, self.hooks, self.fidelity, self.what),
            self.comparisons + other.comparisons, self.counted + other.counted, self.true + other.true,
            max(self.worst, other.worst, key=abs),
        )  # fmt: skip

    def key(self) -> tuple[str, ...]:
        return self.collector, self.kernel, self.hooks, self.what


_rows: dict[tuple[str, ...], Row] = {}


def kernel() -> str:
    """`6.12.57+deb13`, `6.1.0-41`: the release without the flavour of its build."""
    found = re.match(r"\d+\.\d+(\.\d+)?(-\d+|\+deb\d+)?", platform.release())
    return found.group() if found else platform.release()


def compared(loaded: Any, what: str, counted: float, true: float) -> None:
    """Keeps one comparison of a loaded collector (`tests.kernel.conftest.Loaded`); it asserts nothing."""
    programs: Mapping[str, Any] = loaded.engine.status()["collectors"][loaded.name]["programs"]
    hooks = ", ".join(dict.fromkeys(one["hook"] for one in programs.values()))
    fidelity = "approximate" if any(one["fidelity"] != "exact" for one in programs.values()) else "exact"
    worst = counted / true - 1 if true else float(bool(counted))
    row = Row(loaded.name, kernel(), hooks, fidelity, what, 1, counted, true, worst)
    known = _rows.get(row.key())
    _rows[row.key()] = known.plus(row) if known else row


def leave() -> None:
    """At the end of a run: one file for this kernel, where a folder is wanted."""
    if os.environ.get(FOLDER) and _rows:
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kernel()}.json").write_text(dump(_rows.values()))


def dump(rows: Iterable[Row]) -> str:
    return json.dumps([asdict(row) for row in sorted(rows)], indent=1) + "\n"


def parse(text: str) -> list[Row]:
    return [Row(**one) for one in json.loads(text)]


def merge(known: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New results of a collector on a kernel series (`6.12`) take the place of the old ones."""
    again = {(row.collector, series(row.kernel)) for row in new}
    return sorted([*(row for row in known if (row.collector, series(row.kernel)) not in again), *new])


def series(release: str) -> str:
    return ".".join(release.split(".")[:2])


def page(rows: Sequence[Row]) -> str:
    """The whole of docs/accuracy.md."""
    parts = [_HEAD]
    for collector in dict.fromkeys(row.collector for row in sorted(rows)):
        parts += [
            f"\n## {collector}\n",
            "| kernel | hooks | fidelity | compared | counted | true | counted / true | worst | comparisons |",
            "|--------|-------|----------|----------|--------:|-----:|---------------:|------:|------------:|",
        ]
        own = [row for row in rows if row.collector == collector]
        parts += [_line(row) for row in sorted(own, key=lambda row: (_version(row.kernel), row))]
    return "\n".join(parts) + "\n"


def _line(row: Row) -> str:
    hooks = row.hooks.replace(", ", "<br>")
    ratio = f"{row.counted / row.true:.6f}" if row.true else "–"
    worst = f"{row.worst * 100:+.3f} %" if row.worst else "0"
    cells = (row.kernel, hooks, row.fidelity, row.what, f"{row.counted:,.10g}", f"{row.true:,.10g}", ratio, worst)
    return f"| {' | '.join(cells)} | {row.comparisons} |"


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in series(release).split("."))


def main(paths: Sequence[str]) -> None:
    rows = parse(STORE.read_text()) if STORE.exists() else []
    for path in paths:
        rows = merge(rows, parse(Path(path).read_text()))
    STORE.write_text(dump(rows))
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
