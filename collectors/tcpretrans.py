# SPDX-License-Identifier: Apache-2.0
"""Retransmitted TCP segments by family, state and kind.

Kinds: `syn` and `synack` repeat a handshake, `probe` is a tail loss probe that repeats data (TCPLossProbes also counts
those that send new data), `data` is all else. Truth: RetransSegs in `/proc/net/snmp` of all network namespaces, which
counts failed attempts too (TCPRetransFail in `/proc/net/netstat`); before kernel 6.18 these cannot be seen.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from collectors.decoders import (
    FAMILIES,
    OTHER,
    TCP_STATES,
    Totals,
    address,
    endpoints,
    endpoints_labels,
    endpoints_of_words,
    exemplar,
)
from daemon.declare import (
    NET_NAMESPACE,
    Collector,
    Context,
    Decoded,
    Event,
    Hook,
    Option,
    Part,
    Row,
    Tables,
    Truth,
    Variant,
)
from daemon.model import Metric

KINDS = ("data", "syn", "synack", "probe")  # enum kind
_STATES = 16
MAX_SERIES = 1000
RING_PAGES = 64
SNMP, NETSTAT = "/proc/net/snmp", "/proc/net/netstat"
NAMESPACE_SEGMENTS = 1  # enum namespace_word
MESSAGE_ID = "3f0c9d1a5d9b4c0e8f2a6b7c1d3e5f70"

FAILURES = Metric(
    "bpf_tcp_retransmit_failures", "counter", "TCP segments whose retransmission failed (seen from kernel 6.18 on).",
    ("family",),
)  # fmt: skip


def _retransmits(options: Mapping[str, Any]) -> Metric:
    by = () if options["by"] == "none" else (options["by"],)
    return Metric("bpf_tcp_retransmits", "counter", "Retransmitted TCP segments.", ("family", "state", "kind", *by))


def _split(index: int) -> tuple[str, str, str]:
    """(family * 16 + state) * 4 + kind."""
    rest, kind = divmod(index, len(KINDS))
    family, state = divmod(rest, _STATES)
    return FAMILIES[family], TCP_STATES[state], KINDS[kind]


def _possible(state: str, kind: str) -> bool:
    """Which pairs a kernel can give: these are exported at 0 from the start."""
    if kind == "syn":
        return state == "syn_sent"
    if kind == "synack":
        return state in ("syn_recv", "new_syn_recv")
    if kind == "probe":
        return state in ("established", "close_wait", "fin_wait1", "closing", "last_ack")
    return state in ("established", "close_wait", "fin_wait1", "fin_wait2", "closing", "last_ack")


def subnet(word: int, family: str) -> str:
    """Network of a peer: /24 of IPv4, /64 of IPv6, from the first word of its address."""
    bits = 24 if family == "ipv4" else 64
    return str(ipaddress.ip_network((address((word, 0), family), bits)))


def _words(words: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return endpoints_labels(endpoints_of_words(words))


def decode(tables: Tables, context: Context) -> Decoded:
    by = context.options["by"]
    totals = Totals(_retransmits(context.options), context.max_series)

    def add(row: Row, index: int, *more: str) -> None:
        family, state, kind = _split(index)
        value = row.value["segments"]
        if value or _possible(state, kind):
            found = exemplar(row.value.get("segments_exemplar"), 1, context, _words)
            totals.add((family, state, kind, *more), value, found)

    for row in tables["retransmits"]:
        if row.key % (_STATES * len(KINDS)) // len(KINDS) < len(TCP_STATES):
            add(row, row.key, *(() if by == "none" else (OTHER,)))
    for row in tables["retransmits_by"]:
        family, _, _ = _split(row.key["index"])
        word = row.key["by"][0]
        add(row, row.key["index"], str(word) if by == "local_port" else subnet(word, family))
    failures = Totals(FAILURES, context.max_series)
    for row in tables["failures"]:
        failures.add((FAMILIES[row.key],), row.value)
    return Decoded([totals.family(context.created), failures.family(context.created)], totals.dropped)


def event(record: Any, context: Context) -> Event:
    ends = endpoints(record["ends"])
    kind, state = KINDS[record["kind"]], TCP_STATES[record["state"]]
    fields = dict(endpoints_labels(ends)) | {"kind": kind, "state": state, "segments": record["segments"]}
    message = (
        f"TCP retransmit ({kind}) {ends.local}:{ends.local_port} -> {ends.remote}:{ends.remote_port} in state {state}"
    )
    return Event(MESSAGE_ID, 6, message, fields, context.wall_clock(record["time_ns"]))


def _sent_again(texts: Mapping[str, str]) -> int:
    """Segments that were sent again, without the attempts that failed. Names and values are on lines of their own."""
    found: dict[str, int] = {}
    for path in (SNMP, NETSTAT):
        lines = texts[path].splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=False):
            found |= zip(names.split()[1:], map(int, values.split()[1:]), strict=False)
    return found["RetransSegs"] - found["TCPRetransFail"]


def _counted(began: Mapping[str, str], now: Mapping[str, str], tables: Tables) -> tuple[int, int] | None:
    """Of the loader's network namespace; the account of another one, if the reader is in it, says nothing of that."""
    if began[NET_NAMESPACE] != now[NET_NAMESPACE]:
        return None
    (ours,) = (row.value for row in tables["net_namespace"] if row.key == NAMESPACE_SEGMENTS)
    return ours, _sent_again(now) - _sent_again(began)


def _defines(options: Mapping[str, Any]) -> dict[str, int]:
    macros: dict[str, int] = {}
    if options["by"] != "none":
        macros |= {f"BY_{options['by'].upper()}": 1, "MAX_SERIES": MAX_SERIES}
    if options["events"]:
        macros |= {"EVENTS_ON": 1, "RING_PAGES": RING_PAGES}
    return macros


COLLECTOR = Collector(
    name="tcpretrans",
    summary="retransmitted TCP segments by family, state and kind",
    parts=tuple(
        Part(target, tuple(Variant({target: Hook(kind, target)}) for kind in ("tp_btf", "raw_tp")))
        for target in ("tcp_retransmit_skb", "tcp_retransmit_synack")
    ),
    structs={
        "sock": ("__sk_common", "sk_cgrp_data?"),
        "sock_common": (
            "skc_daddr",
            "skc_rcv_saddr",
            "skc_dport",
            "skc_num",
            "skc_family",
            "skc_state",
            "skc_v6_daddr",
            "skc_v6_rcv_saddr",
            "skc_net",
        ),
        "net": ("ns",),
        "ns_common": ("inum",),
        "sock_cgroup_data": ("cgroup?",),
        "cgroup": ("kn",),
        "kernfs_node": ("id",),
        "sk_buff": ("cb", "tstamp"),
        "tcp_skb_cb": ("tcp_gso_segs", "sacked"),
        "request_sock": ("__req_common",),
        "tcp_sock": ("inet_conn", "tcp_clock_cache"),
        "inet_connection_sock": ("icsk_pending",),
    },
    options=(
        Option(
            "by",
            "choice",
            "none",
            "a further label: the peer's network, or the local port",
            choices=("none", "remote_subnet", "local_port"),
        ),
        Option("events", "bool", False, "write each retransmission to the journal"),
    ),
    metrics=lambda options: (_retransmits(options), FAILURES),
    defines=_defines,
    tables=("retransmits", "retransmits_by", "failures", "net_namespace"),
    decode=decode,
    truth=Truth((NET_NAMESPACE, SNMP, NETSTAT), _counted, enough=100),
    event=event,
)
