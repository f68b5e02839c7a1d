# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from collectors.tcpretrans import COLLECTOR, NETSTAT, SNMP, decode, event, subnet
from daemon.declare import NET_NAMESPACE, Context, Row

CONTEXT = Context(
    options={"by": "none"}, max_series=1000, created=5.0, cgroup_path=lambda _: "", wall_clock=lambda ns: ns / 1e9
)
FAILURES = [Row(0, 3), Row(1, 0)]


def index(family: int, state: int, kind: int) -> int:
    return (family * 16 + state) * 4 + kind


def words(address: str) -> list[int]:
    raw = ipaddress.ip_address(address).packed.ljust(16, b"\0")
    return [int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")]


def everything() -> list[Row]:
    return [Row(number, {"segments": 0}) for number in range(2 * 16 * 4)]


def test_possible_label_sets_are_there_at_zero_and_others_only_when_seen() -> None:
    rows = everything()
    rows[index(0, 1, 0)] = Row(index(0, 1, 0), {"segments": 7})
    rows[index(1, 10, 0)] = Row(index(1, 10, 0), {"segments": 1})  # data in state listen: not expected, so not hidden
    sent, failed = decode({"retransmits": rows, "retransmits_by": [], "failures": FAILURES}, CONTEXT).families
    found = {series.labels: series.value for series in sent.series}
    assert found["ipv4", "established", "data"] == 7
    assert found["ipv6", "syn_sent", "syn"] == 0
    assert found["ipv6", "listen", "data"] == 1
    assert ("ipv4", "listen", "data") not in found
    assert {series.labels: series.value for series in failed.series} == {("ipv4",): 3, ("ipv6",): 0}


@pytest.mark.parametrize(
    ("address", "family", "network"),
    [("10.1.2.3", "ipv4", "10.1.2.0/24"), ("2001:db8:1:2:3::4", "ipv6", "2001:db8:1:2::/64")],
)
def test_subnet(address: str, family: str, network: str) -> None:
    mask = 0xFFFFFF if family == "ipv4" else 0xFFFFFFFFFFFFFFFF
    assert subnet(words(address)[0] & mask, family) == network


def test_a_further_label_by_port() -> None:
    by_port = replace(CONTEXT, options={"by": "local_port"})
    rows = [Row({"by": [443, 0], "index": index(0, 1, 0)}, {"segments": 2})]
    sent, _ = decode({"retransmits": everything(), "retransmits_by": rows, "failures": FAILURES}, by_port).families
    found = {series.labels: series.value for series in sent.series}
    assert found["ipv4", "established", "data", "443"] == 2
    assert found["ipv4", "established", "data", "other"] == 0


def account(segments: int, failed: int, namespace: str = "net:[7]") -> dict[str, str]:
    return {
        NET_NAMESPACE: namespace,
        SNMP: f"Ip: Forwarding\nIp: 1\nTcp: MaxConn RetransSegs OutRsts\nTcp: -1 {segments} 9\n",
        NETSTAT: f"TcpExt: SyncookiesSent TCPRetransFail\nTcpExt: 4 {failed}\nIpExt: InNoRoutes\nIpExt: 5\n",
    }


def test_coverage_is_of_what_was_sent_in_the_loaders_network_namespace() -> None:
    assert COLLECTOR.truth
    tables = {"net_namespace": [Row(0, 7), Row(1, 90)]}
    assert COLLECTOR.truth.counted(account(1000, 10), account(1105, 15), tables) == (90, 100)
    assert COLLECTOR.truth.counted(account(1000, 10), account(1105, 15, "net:[8]"), tables) is None


def test_event_is_a_sentence_and_its_facts() -> None:
    ends = {"local": words("10.0.0.1"), "remote": words("10.0.0.2"), "ports": 443 | 50000 << 16, "family": 0}
    record = {"time_ns": 2_000_000_000, "ends": ends, "state": 1, "kind": 3, "segments": 1}
    found = event(record, CONTEXT)
    assert found.message == "TCP retransmit (probe) 10.0.0.1:443 -> 10.0.0.2:50000 in state established"
    assert found.timestamp == 2.0
    assert found.fields["rport"] == "50000"
