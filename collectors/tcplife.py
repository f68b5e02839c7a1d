# SPDX-License-Identifier: Apache-2.0
"""TCP connections: duration, payload each way, opened and closed, by family, direction and local port.

A connection counts as opened when it is established, and enters the histograms when it reaches CLOSE (or hands over to
TIME_WAIT). Payload is without SYN, FIN and retransmissions. Connections that are older than the programs have a
duration of at least what is shown: it runs from the moment of loading. Of these only those of the loader's network
namespace are known; the kernel does not show a process the sockets of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collectors.decoders import (
    FAMILIES,
    OTHER,
    Totals,
    counts,
    endpoints,
    endpoints_labels,
    endpoints_of_words,
    words_text,
)
from daemon.cgroups import pod
from daemon.declare import Collector, Context, Decoded, Event, Hook, Option, Part, Tables, Variant, twice
from daemon.histogram import BYTES, SECONDS
from daemon.model import Metric

DIRECTIONS = ("inbound", "outbound")  # enum direction
RING_PAGES = 64
MESSAGE_ID = "a4c1e7f2b9d84e3c9a5d0b6e8f1c2d37"
_LABELS = ("family", "direction", "port")

DURATION = Metric(
    "bpf_tcp_connection_duration_seconds", "histogram", "Time from a TCP connection's handshake to its close.",
    _LABELS, "seconds", SECONDS.bounds,
)  # fmt: skip
SENT = Metric(
    "bpf_tcp_connection_sent_bytes", "histogram", "Payload that a TCP connection sent, without retransmissions.",
    _LABELS, "bytes", BYTES.bounds,
)  # fmt: skip
RECEIVED = Metric(
    "bpf_tcp_connection_received_bytes", "histogram", "Payload that a TCP connection received.",
    _LABELS, "bytes", BYTES.bounds,
)  # fmt: skip
OPENED = Metric("bpf_tcp_connections_opened", "counter", "TCP connections that were established.", _LABELS)


def _words(words: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return endpoints_labels(endpoints_of_words(words))


def decode(tables: Tables, context: Context) -> Decoded:
    ports = [*map(str, context.options["local_ports"]), OTHER]
    duration, sent, received, opened = (
        Totals(metric, context.max_series) for metric in (DURATION, SENT, RECEIVED, OPENED)
    )
    for row in tables["connections"]:
        rest, port = divmod(row.key, len(ports))
        family, direction = divmod(rest, len(DIRECTIONS))
        labels = (FAMILIES[family], DIRECTIONS[direction], ports[port])
        duration.add(labels, counts(row.value, "duration", SECONDS, context, _words))
        sent.add(labels, counts(row.value, "sent", BYTES, context, _words))
        received.add(labels, counts(row.value, "received", BYTES, context, _words))
        opened.add(labels, row.value["opened"])
    return Decoded([one.family(context.created) for one in (duration, sent, received, opened)], duration.dropped)


def event(record: Any, context: Context) -> Event:
    ends = endpoints(record["ends"])
    direction, comm = DIRECTIONS[record["direction"]], words_text(record["comm"])
    arrow = "->" if direction == "outbound" else "<-"
    seconds = record["duration_ns"] / 1e9
    path = context.cgroup_path(record["cgroup"])
    fields = dict(endpoints_labels(ends)) | {
        "pid": record["pid"], "comm": comm, "direction": direction, "duration_ns": record["duration_ns"],
        "sent": record["sent"], "received": record["received"], "cgroup": path, **dict(pod(path)),
    }  # fmt: skip
    message = (
        f"TCP connection {ends.local}:{ends.local_port} {arrow} {ends.remote}:{ends.remote_port} ({comm}) closed "
        f"after {seconds:.3f} s, {record['sent']} B sent, {record['received']} B received"
    )
    return Event(MESSAGE_ID, 6, message, fields, context.wall_clock(record["time_ns"]))


def _defines(options: Mapping[str, Any]) -> dict[str, int | str]:
    ports = options["local_ports"]
    macros: dict[str, int | str] = {
        "MAX_CONNECTIONS": options["max_connections"],
        "PORTS": len(ports) + 1,
        "PORT_CASES": " ".join(f"case {port}: return {place};" for place, port in enumerate(ports)),
    }
    if options["events"]:
        macros |= {"EVENTS_ON": 1, "RING_PAGES": RING_PAGES}
    return macros


COLLECTOR = Collector(
    name="tcplife",
    summary="TCP connections: duration, payload each way, opened and closed",
    parts=(
        Part(
            "inet_sock_set_state", tuple(Variant(twice(kind, "inet_sock_set_state")) for kind in ("tp_btf", "raw_tp"))
        ),
        Part(
            "seed",
            (
                Variant({"seed": Hook("iter", "tcp")}),
                Variant({}, approximate="connections older than the programs are not seen: no iterator over sockets"),
            ),
        ),
    ),
    structs={
        "sock": ("__sk_common", "sk_protocol", "sk_cgrp_data?"),
        "sock_common": (
            "skc_daddr",
            "skc_rcv_saddr",
            "skc_dport",
            "skc_num",
            "skc_family",
            "skc_state",
            "skc_v6_daddr",
            "skc_v6_rcv_saddr",
            "skc_flags",
        ),
        "sock_cgroup_data": ("cgroup?",),
        "cgroup": ("kn",),
        "kernfs_node": ("id",),
        "tcp_sock": (
            "inet_conn",
            "bytes_acked",
            "bytes_sent",
            "bytes_retrans",
            "bytes_received",
            "snd_nxt",
            "snd_una",
            "write_seq",
        ),
        "inet_connection_sock": ("icsk_inet",),
        "inet_sock": ("inet_sport",),
    },
    constants=("sock_flags.SOCK_DONE",),
    options=(
        Option(
            "local_ports", "ports", (), "local ports with a label value of their own; others are 'other'", maximum=64
        ),
        Option("max_connections", "int", 16384, "connections that may be open at once", minimum=256, maximum=1 << 20),
        Option("events", "bool", False, "write each closed connection to the journal"),
    ),
    metrics=lambda options: (DURATION, SENT, RECEIVED, OPENED),
    defines=_defines,
    tables=("connections",),
    decode=decode,
    event=event,
)
