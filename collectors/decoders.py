# SPDX-License-Identifier: Apache-2.0
"""From fields of kernel structs to label values and exemplars: tiny and pure, shared by the collectors."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daemon.cgroups import pod
from daemon.declare import Context
from daemon.histogram import Counts, Scale
from daemon.model import EXEMPLAR_LABELS_MAX, Exemplar, Family, Metric, Series

OTHER = "other"
Labels = tuple[str, ...]
Words = Callable[[Sequence[int]], tuple[tuple[str, str], ...]]

# enum in include/net/tcp_states.h, which is user-space ABI
TCP_STATES = (
    "unknown", "established", "syn_sent", "syn_recv", "fin_wait1", "fin_wait2", "time_wait", "close", "close_wait",
    "last_ack", "listen", "closing", "new_syn_recv", "bound_inactive",
)  # fmt: skip
FAMILIES = ("ipv4", "ipv6")
_SHORTEST = {"cgroup": 16, "pod": 9}  # exemplar labels of which a part is worth having: so many characters at least


def text(raw: bytes) -> str:
    """char[]: up to the first NUL; what is not UTF-8 is replaced."""
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def words_text(words: Sequence[int]) -> str:
    """A char[] that the kernel side moves as 64-bit words."""
    return text(b"".join(word.to_bytes(8, "little") for word in words))


def address(words: Sequence[int], family: str) -> str:
    """Two words that hold an IPv6 address, or an IPv4 one in the first four bytes, in network order."""
    raw = words[0].to_bytes(8, "little") + words[1].to_bytes(8, "little")
    return str(ipaddress.IPv4Address(raw[:4]) if family == "ipv4" else ipaddress.IPv6Address(raw))


@dataclass(frozen=True, slots=True)
class Endpoints:
    family: str
    local: str
    local_port: int
    remote: str
    remote_port: int


def endpoints(raw: Mapping[str, Any]) -> Endpoints:
    """struct endpoints of bpf/include/tcp.h."""
    family, ports = FAMILIES[raw["family"]], raw["ports"]
    local, remote = (address(raw[end], family) for end in ("local", "remote"))
    return Endpoints(family, local, ports & 0xFFFF, remote, ports >> 16 & 0xFFFF)


def endpoints_of_words(words: Sequence[int]) -> Endpoints:
    """The same struct as an exemplar carries it, in six words."""
    return endpoints({"local": words[0:2], "remote": words[2:4], "ports": words[4], "family": words[5] & 0xFFFFFFFF})


def endpoints_labels(ends: Endpoints) -> tuple[tuple[str, str], ...]:
    """Exemplar labels and journal fields."""
    return (
        ("laddr", ends.local),
        ("lport", str(ends.local_port)),
        ("raddr", ends.remote),
        ("rport", str(ends.remote_port)),
    )


def fit(labels: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Leaves out empty values and what would pass the limit; a long cgroup path loses its head, a pod's id its tail."""
    room, kept = EXEMPLAR_LABELS_MAX, []
    for name, value in labels:
        if not value:
            continue
        left = room - len(name)
        if len(value) > left:
            if left < _SHORTEST.get(name, EXEMPLAR_LABELS_MAX):
                continue
            value = "…" + value[1 - left :] if name == "cgroup" else value[: left - 1] + "…"
        room -= len(name) + len(value)
        kept.append((name, value))
    return tuple(kept)


def place(path: str) -> tuple[tuple[str, str], ...]:
    """A cgroup's path as exemplar labels: its container and pod, whose path is long and says no more, or itself."""
    return pod(path) or (("cgroup", path),)


def exemplar(
    raw: Mapping[str, Any] | None, unit: int, context: Context, words: Words = lambda words: ()
) -> Exemplar | None:
    """struct exemplar; None where there is none yet or it was torn. The value is in base units then."""
    if raw is None:
        return None
    labels: list[tuple[str, str]] = []
    if raw["pid"]:
        labels += [("pid", str(raw["pid"])), ("comm", words_text(raw["comm"]))]
    labels += words(raw["words"])
    if raw["cgroup"]:
        labels += place(context.cgroup_path(raw["cgroup"]))
    return Exemplar(fit(labels), raw["value"] / unit, context.wall_clock(raw["time_ns"]))


def counts(
    value: Mapping[str, Any], name: str, scale: Scale, context: Context, words: Words = lambda words: ()
) -> Counts:
    """A kernel histogram and the exemplars beside it (`<name>_exemplars`, where they are compiled in)."""
    raw = value[name]
    found = {
        octave: decoded
        for octave, one in enumerate(value.get(f"{name}_exemplars", ()))
        if (decoded := exemplar(one, scale.unit, context, words))
    }
    return Counts(scale, raw["slots"], raw["overflow"], raw["sum"], found)


class Totals:
    """Label sets of one family on the way to series: equal ones add up, and at most `limit` stay.

    What does not fit is added to one series whose label values are `other`, and counted in `dropped`.
    """

    def __init__(self, metric: Metric, limit: int) -> None:
        self.metric = metric
        self.limit = limit
        self.dropped = 0
        self._values: dict[Labels, int | Counts] = {}
        self._exemplars: dict[Labels, Exemplar] = {}

    def add(self, labels: Labels, value: int | Counts, found: Exemplar | None = None) -> None:
        if labels not in self._values and len(self._values) >= self.limit:
            self.dropped += 1
            labels = (OTHER,) * len(labels)
        before = self._values.get(labels)
        self._values[labels] = value if before is None else before + value  # type: ignore[operator]
        known = self._exemplars.get(labels)
        if found and (known is None or known.timestamp < found.timestamp):
            self._exemplars[labels] = found

    def family(self, created: float) -> Family:
        return Family(
            self.metric,
            [
                Series(
                    labels,
                    value.distribution() if isinstance(value, Counts) else value,
                    created,
                    self._exemplars.get(labels),
                )
                for labels, value in self._values.items()
            ],
        )
