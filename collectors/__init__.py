# SPDX-License-Identifier: Apache-2.0
"""The registry: every collector, in the order in which people read about them."""

from __future__ import annotations

from collectors import biolatency
from daemon.declare import Collector

ALL: tuple[Collector, ...] = (biolatency.COLLECTOR,)

BY_NAME: dict[str, Collector] = {collector.name: collector for collector in ALL}
if len(BY_NAME) != len(ALL):
    raise RuntimeError("two collectors have the same name")
