# SPDX-License-Identifier: Apache-2.0
"""What we counted against what the kernel counted of the same: 1.0 means that nothing was missed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from daemon.declare import Collector, Tables


def texts(collector: Collector) -> dict[str, str]:
    """The kernel's own account now; a file that this kernel does not have is left out."""
    found = {}
    for path in collector.truth.files if collector.truth else ():
        try:
            found[path] = os.readlink(path) if os.path.islink(path) else Path(path).read_text()
        except OSError:
            continue
    return found


def ratio(collector: Collector, began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> float | None:
    """Ours by the kernel's; None where the kernel keeps no account that compares, 1.0 until it has counted enough."""
    if collector.truth is None or any(path not in began or path not in now for path in collector.truth.files):
        return None
    counted = collector.truth.counted(began, now, tables)
    if counted is None:
        return None
    ours, kernels = counted
    return ours / kernels if kernels >= collector.truth.enough else 1.0
