# SPDX-License-Identifier: Apache-2.0
"""Which resource hurts: the bounds, from both sides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from daemon import recent, triage
from daemon.histogram import SECONDS
from daemon.model import Distribution
from daemon.recent import Change, Group, Now, Point, Reading, Value
from tests.daemon.host import Host, view

RULES = Path(__file__).parents[2] / "config" / "rules"
BOUNDS = dict.fromkeys((recent.DISK, recent.WAIT), SECONDS.bounds)
UP = {name: True for names in triage.RESOURCES.values() for name in names}


def times(seconds: float, count: int = 100) -> Distribution:
    """So many events just below a bound."""
    return Distribution(tuple(count * (bound >= seconds) for bound in SECONDS.bounds), count, seconds * count)


def now(came: dict[str, dict[Group, Value]], ever: dict[str, dict[Group, Value]] | None = None, **tail: float) -> Now:
    fields = dict.fromkeys(Point._fields, 0.0) | tail
    return Now(Reading(10.0, ever or came, BOUNDS), Change(10.0, came), (), Point(**fields))


def disk(seconds: float, usual: float, operation: str = "write", count: int = 100) -> triage.Finding:
    key = ("sda", operation)
    return triage.disk(now({recent.DISK: {key: times(seconds, count)}}, {recent.DISK: {key: times(usual, 10**6)}}))


def test_a_disk_is_slow_by_its_own_measure_or_by_any() -> None:
    assert (disk(2**-5, 2**-10).word, disk(2**-5, 2**-5).word, disk(1.0, 1.0).word) == ("slow", "fine", "slow")
    assert disk(2**-7, 2**-15).word == "fine"
    assert disk(2**-5, 2**-10).sign == "sda write p99 31 ms, since start 0.97 ms"


def test_who_is_hardly_asked_and_discards_that_nobody_waits_for_say_nothing() -> None:
    assert disk(8.0, 2**-10, count=recent.ENOUGH - 1).word == "idle"
    assert disk(8.0, 2**-10, operation="discard").word == "idle"


def test_a_slow_disk_goes_before_one_that_is_always_like_that() -> None:
    came = {("sda", "write"): times(2**-4), ("sdb", "write"): times(2**-3)}
    usual = {("sda", "write"): times(2**-10, 10**6), ("sdb", "write"): times(2**-3, 10**6)}
    found = triage.slowest(now({recent.DISK: came}, {recent.DISK: usual}))
    assert found
    assert (found.group, found.slow) == (("sda", "write"), True)


def test_failed_requests() -> None:
    assert triage.disk(now({}, errors=3.0)).sign == "3 failed requests"


def test_waits_for_a_cpu() -> None:
    words = [triage.cpu(now({recent.WAIT: {(): times(one)}})).word for one in (2**-5, 2**-4)]
    assert words == ["fine", "saturated"]
    assert triage.cpu(now({})).word == "idle"


def cache(accesses: int, misses: int, usual: float = 0.01) -> str:
    came = {recent.ACCESSES: {(): accesses}, recent.MISSES: {(): misses}}
    ever = {recent.ACCESSES: {(): 1e9}, recent.MISSES: {(): usual * 1e9}}
    return triage.memory(now(came, ever)).word  # type: ignore[arg-type]


def test_a_page_cache_that_no_longer_holds_what_is_read() -> None:
    assert cache(100_000, 30_000) == "misses"
    assert cache(100_000, 30_000, usual=0.3) == "fine"
    assert cache(10_000, 3_000) == "fine"  # few
    assert cache(0, 0) == "idle"


def test_kills_go_before_all_else_of_memory() -> None:
    found = triage.memory(now({}, kills=2.0))
    assert (found.word, found.sign, found.collector) == ("ran out", "2 OOM kills", "oomkill")


@pytest.mark.parametrize(
    ("retransmits", "segments", "word"),
    [(200, 1000, "losing"), (5, 50, "fine"), (20, 1000, "fine"), (1500, None, "losing"), (900, None, "fine")],
)
def test_segments_that_are_lost(retransmits: int, segments: int | None, word: str) -> None:
    came: dict[str, dict[Group, Value]] = {recent.RETRANSMITS: {("data",): retransmits}}
    if segments:
        came[recent.SEGMENTS] = {(): segments}
    assert triage.network(now(came)).word == word


def test_a_resource_that_nobody_looks_at_is_not_called_fine() -> None:
    calm = view(Host()).now
    found = triage.triage(calm, {**UP, "biolatency": False})
    assert (found["Disk"].word, found["Disk"].sign) == ("unknown", "its collectors are down")
    assert triage.triage(calm, {})["CPU"].sign == "not configured"
    assert triage.triage(calm, {**UP, "tcplife": False})["Network"].word == "fine"
    first = triage.triage(Now(calm.reading), UP)
    assert {one.sign for one in first.values()} == {"first reading"}


def test_one_thing_at_a_time() -> None:
    assert [name for name, one in triage.triage(view(Host()).now, UP).items() if one.bad] == []
    assert [name for name, one in triage.triage(view(Host(), trouble=3).now, UP).items() if one.bad] == ["Disk"]


def test_the_bounds_are_those_of_the_alerts() -> None:
    rules = re.sub(r"\s+", " ", (RULES / "alerting.yaml").read_text())
    for bound in (
        f"> {triage.DISK_TIMES} * instance_device_operation:bpf_block_io_duration_seconds:p99_median1d",
        f"instance_device_operation:bpf_block_io_duration_seconds:p99_rate5m > {triage.DISK_SECONDS}",
        f"instance:bpf_run_queue_latency_seconds:p99_rate5m > {triage.WAIT_SECONDS}",
        f"instance:bpf_page_cache_hit:ratio_rate5m < {triage.HIT_SHARE} * ",
        f"instance:bpf_page_cache_misses:rate5m > {triage.MISS_RATE}",
        f"instance:bpf_tcp_retransmits:ratio_rate5m > {triage.RETRANSMIT_SHARE} ",
        f"instance:bpf_tcp_retransmits:rate5m > {triage.RETRANSMIT_FEW}",
        f"instance:bpf_tcp_retransmits:rate5m > {triage.RETRANSMIT_MANY} unless",
    ):
        assert bound in rules
    records = (RULES / "recording.yaml").read_text()
    pattern = re.search(r'error!~"([^"]+)"', records)
    assert pattern
    for error in ("notsupp", "eopnotsupp", "again", "eagain", "ioerr", "medium"):
        assert bool(re.fullmatch(pattern[1], error)) == (error in recent._NO_FAULT)
