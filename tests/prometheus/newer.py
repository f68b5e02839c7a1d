# SPDX-License-Identifier: Apache-2.0
"""Prometheus 3 and its promtool, which Debian 12 and 13 do not have: `python -m tests.prometheus.newer` unpacks them.

They come from a newer suite through an apt of its own. They are not installed, and the host's apt is not touched.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.vm.images import Apt, CannotBuildError

SUITE = "forky"
FOLDER = Path(__file__).resolve().parent.parent.parent / ".venv" / f"prometheus-{SUITE}"
_PROGRAMS = ("prometheus", "promtool")


def unpack() -> None:
    """Raises `CannotBuildError`."""
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER.name}-", dir=FOLDER.parent) as name:
        tree = Path(name, "tree")
        Apt(SUITE, Path(name, "apt")).unpack(_PROGRAMS, tree)
        (tree / "usr" / "bin").rename(FOLDER)


def main() -> int:
    if FOLDER.is_dir():
        return 0
    print(f"setup: unpacking Prometheus 3 of Debian's {SUITE} into .venv")
    try:
        unpack()
    except CannotBuildError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
