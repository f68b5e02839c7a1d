# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

from collectors.tcplife import COLLECTOR, decode, event
from daemon.declare import Context, Row
from daemon.histogram import BYTES, SECONDS, Scale

CONTEXT = Context(
    options={"local_ports": [80, 443]},
    max_series=1000,
    created=5.0,
    cgroup_path=lambda _: "/x",
    wall_clock=lambda _: 1.0,
)


def histogram(scale: Scale, *values: int) -> dict[str, Any]:
    slots = [0] * (scale.slots + 1)
    for value in values:
        slots[scale.slot(value)] += 1
    return {"slots": slots[:-1], "overflow": slots[-1], "sum": sum(values)}


def value(*durations_ns: int) -> dict[str, Any]:
    return {
        "duration": histogram(SECONDS, *durations_ns),
        "sent": histogram(BYTES),
        "received": histogram(BYTES),
        "opened": len(durations_ns),
    }


def test_index_names_family_direction_and_port() -> None:
    rows = [Row(number, value()) for number in range(2 * 2 * 3)]
    rows[4] = Row(4, value(2_000_000_000))  # (ipv4 * 2 + outbound) * 3 + second port
    duration, _, _, opened = decode({"connections": rows}, CONTEXT).families
    assert len(duration.series) == 12
    found = {series.labels: series.value for series in duration.series}
    assert found["ipv4", "outbound", "443"].sum == 2.0
    assert found["ipv6", "inbound", "other"] == SECONDS.empty
    assert {series.labels: series.value for series in opened.series}["ipv4", "outbound", "443"] == 1


def test_ports_become_cases_of_the_program() -> None:
    macros = COLLECTOR.defines({"local_ports": (80, 443), "max_connections": 256, "events": False})
    assert macros == {"MAX_CONNECTIONS": 256, "PORTS": 3, "PORT_CASES": "case 80: return 0; case 443: return 1;"}


def test_event_is_a_sentence_and_its_facts() -> None:
    ends = {"local": [0x0100007F, 0], "remote": [0x0200007F, 0], "ports": 80 | 5000 << 16, "family": 0}
    record = {
        "time_ns": 1, "duration_ns": 1_500_000_000, "sent": 10, "received": 20, "pid": 7, "cgroup": 3,
        "comm": [int.from_bytes(b"nginx\0\0\0", "little"), 0], "ends": ends, "direction": 0,
    }  # fmt: skip
    found = event(record, CONTEXT)
    assert found.message == (
        "TCP connection 127.0.0.1:80 <- 127.0.0.2:5000 (nginx) closed after 1.500 s, 10 B sent, 20 B received"
    )
    assert found.fields["cgroup"] == "/x"
    assert not {"pod", "container"} & set(found.fields)
    path = f"/kubepods/pod1b2c3d4e-0123-4567-89ab-0123456789ab/{'c0ffee12' * 8}"
    fields = event(record, replace(CONTEXT, cgroup_path=lambda _: path)).fields
    assert (fields["cgroup"], fields["container"]) == (path, "c0ffee12c0ff")
    assert fields["pod"] == "1b2c3d4e-0123-4567-89ab-0123456789ab"
