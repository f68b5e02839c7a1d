# SPDX-License-Identifier: Apache-2.0
"""The kernel's clock on the wall's."""

from __future__ import annotations

import time
from collections.abc import Callable

# Below this an offset that differs is noise of reading two clocks, or their slow slewing. One event must keep one
# time, or Prometheus stores its exemplar again with each scrape.
_STEP_NS = 20_000_000


def offset_ns() -> int:
    """The epoch's nanoseconds less CLOCK_BOOTTIME's (bpf_ktime_get_boot_ns), now."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class WallClock:
    """CLOCK_BOOTTIME nanoseconds as seconds since the epoch; follows a wall clock that is set."""

    def __init__(self, read: Callable[[], int] = offset_ns) -> None:
        self._read = read
        self._offset_ns = read()

    def __call__(self, boot_ns: int) -> float:
        now = self._read()
        if abs(now - self._offset_ns) > _STEP_NS:
            self._offset_ns = now
        return (self._offset_ns + boot_ns) / 1e9
