# SPDX-License-Identifier: Apache-2.0
"""The registry: every collector, in the order in which people read about them."""

from __future__ import annotations

from collectors import biolatency, cachestat, oomkill, runqlat, tcplife, tcpretrans
from daemon.declare import Collector

ALL: tuple[Collector, ...] = (
    biolatency.COLLECTOR,
    runqlat.COLLECTOR,
    tcpretrans.COLLECTOR,
    cachestat.COLLECTOR,
    oomkill.COLLECTOR,
    tcplife.COLLECTOR,
)

BY_NAME: dict[str, Collector] = {collector.name: collector for collector in ALL}
if len(BY_NAME) != len(ALL):
    raise RuntimeError("two collectors have the same name")
