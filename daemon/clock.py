# SPDX-License-Identifier: Apache-2.0
"""The kernel's clock on the wall's."""

from __future__ import annotations

import time


def wall_clock(boot_ns: int) -> float:
    """CLOCK_BOOTTIME nanoseconds (bpf_ktime_get_boot_ns) as seconds since the epoch, by the offset of this moment."""
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + boot_ns) / 1e9
