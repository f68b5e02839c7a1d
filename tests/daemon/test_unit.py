# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from daemon.libbpf import ProgramStatistics
from daemon.unit import missed


def test_what_the_second_copy_sees_is_not_lost() -> None:
    def skipped(count: int) -> ProgramStatistics:
        return ProgramStatistics(runs=0, run_time_ns=0, recursion_misses=count)

    assert missed({}) == 0
    assert missed({"a": skipped(2), "b": skipped(3)}) == 5
    assert missed({"a": skipped(2), "a_again": skipped(7), "b": skipped(3)}) == 3
