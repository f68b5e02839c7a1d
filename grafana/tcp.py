# SPDX-License-Identifier: Apache-2.0
"""TCP: retransmits by what and whom they concern; connections, how long they live and what they carry."""

from __future__ import annotations

from grafana.parts import Help, Query, board, buckets, graph, heatmap, quantile, row

_RETRANSMITS = "rate(bpf_tcp_retransmits_total{HOST}[$__rate_interval])"
_LIFE = "bpf_tcp_connection_duration_seconds"
_SENT = "bpf_tcp_connection_sent_bytes"
_RECEIVED = "bpf_tcp_connection_received_bytes"

_PANELS = (
    row("Retransmits"),
    graph(
        "Retransmits by kind", "pps",
        Help("Segments sent again each second.", "a few a second; probes are cheap insurance.",
             "data: loss or overload on the path. syn: the other side does not answer. synack: the client does not"
             " come back, as after a flood with forged addresses. The points name both ends."),
        Query(f"sum by (kind) ({_RETRANSMITS})", "{{kind}}"), stack=True,
    ),
    graph(
        "Retransmit ratio", "percentunit",
        Help("Segments sent again for each segment sent. Needs node_exporter on the host and the recording rules;"
             " containers with a network namespace of their own count above the line only, so it reads high there.",
             "below 1 %.", "above 3 % users notice. Compare hosts: one alone points at its link, many at the network."),
        Query("instance:bpf_tcp_retransmits:ratio_rate5m{HOST}", "{{instance}}"),
    ),
    graph(
        "Retransmits by state", "pps",
        Help("Segments sent again, by the connection's state.", "mostly established.",
             "fin_wait1, last_ack: peers vanish without a word. syn_recv, new_syn_recv: clients do."),
        Query(f"sum by (state) ({_RETRANSMITS}) > 0", "{{state}}"), stack=True,
    ),
    graph(
        "Retransmits by peer or port, ten most", "pps",
        Help("Segments sent again by the peer's network or the local port, as tcpretrans has it in `by`; one line"
             " with `by: none`.", "spread as the traffic is.", "one network far above the others: the path there."),
        Query(f"topk(10, sum by (remote_subnet, local_port) ({_RETRANSMITS}))", "{{remote_subnet}}{{local_port}}"),
    ),
    graph(
        "Failed retransmits", "pps",
        Help("Segments that could not be sent again at all; seen from kernel 6.18 on.", "0.",
             "no route, no memory, or a full queue on this very host."),
        Query("sum by (family) (rate(bpf_tcp_retransmit_failures_total{HOST}[$__rate_interval]))", "{{family}}"),
    ),
    graph(
        "Retransmits by address family", "pps",
        Help("Segments sent again over IPv4 and IPv6.", "as the traffic is shared between them.",
             "one family alone: its route or its firewall (for IPv6 often ICMP that is filtered)."),
        Query(f"sum by (family) ({_RETRANSMITS})", "{{family}}"), stack=True,
    ),
    row("Connections"),
    graph(
        "Connections opened", "cps",
        Help("Connections established each second; ports that tcplife does not name are `other`.", "follows the load.",
             "a fall: clients do not get through. A jump: clients retry, or a pool of connections is not used."),
        Query("sum by (direction, port) (rate(bpf_tcp_connections_opened_total{HOST}[$__rate_interval]))",
              "{{direction}} {{port}}"), stack=True,
    ),
    heatmap(
        "Life of connections", "s",
        Help("From handshake to close, of connections that closed.", "a band for each kind of client.",
             "a new band at a round number is a timeout. Many short ones: no keep-alive. The points name both ends."),
        buckets(_LIFE),
    ),
    graph(
        "Life of connections, p50 and p99", "s",
        Help("Half of the connections that closed, and all but one in a hundred, lived at most this long.",
             "as it was last week.", "shorter: connections break or are refused early. Longer: the server is slow."),
        Query(quantile(0.5, _LIFE, "HOST", "direction, port"), "{{direction}} {{port}} p50"),
        Query(quantile(0.99, _LIFE, "HOST", "direction, port"), "{{direction}} {{port}} p99"),
    ),
    graph(
        "Payload of closed connections", "Bps",
        Help("Bytes carried by connections, counted when they close.", "follows the load, in lumps.",
             "compare with the interface's counters: the difference is in connections that are still open."),
        Query(f"sum by (direction) (rate({_SENT}_sum{{HOST}}[$__rate_interval]))", "{{direction}} sent"),
        Query(f"sum by (direction) (rate({_RECEIVED}_sum{{HOST}}[$__rate_interval]))", "{{direction}} received"),
    ),
    heatmap(
        "Sent by a connection", "bytes",
        Help("Payload that a connection sent in its life.", "a band for each kind of exchange.",
             "many at 1 byte or less: connections that carry nothing, such as health checks."),
        buckets(_SENT),
    ),
    heatmap(
        "Received by a connection", "bytes",
        Help("Payload that a connection received in its life.", "a band for each kind of exchange.",
             "the band of answers is gone: servers close without a word."),
        buckets(_RECEIVED),
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-tcp", "TCP", "Lost segments, and the life of connections.", _PANELS
)  # fmt: skip
