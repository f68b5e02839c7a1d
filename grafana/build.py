# SPDX-License-Identifier: Apache-2.0
"""Writes grafana/dashboards/*.json from the modules beside it."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import block_io, fleet, host, memory, own, scheduler, tcp
from grafana.parts import Dashboard

FOLDER = Path(__file__).resolve().parent / "dashboards"
ALL: dict[str, Dashboard] = {
    "host.json": host.DASHBOARD,
    "block-io.json": block_io.DASHBOARD,
    "scheduler.json": scheduler.DASHBOARD,
    "tcp.json": tcp.DASHBOARD,
    "memory.json": memory.DASHBOARD,
    "fleet.json": fleet.DASHBOARD,
    "bpfmetricsd.json": own.DASHBOARD,
}


def text(one: Dashboard) -> str:
    return JSONEncoder(indent=2, sort_keys=True).encode(one) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, one in ALL.items():
        (FOLDER / name).write_text(text(one))


if __name__ == "__main__":
    main()
