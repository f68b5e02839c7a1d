# SPDX-License-Identifier: Apache-2.0
"""The recent past: differences of readings, quantiles, the line of the last minutes."""

from __future__ import annotations

import sys

import pytest

from daemon import recent
from daemon.histogram import SECONDS
from daemon.model import Distribution, Exemplar, Family, Metric, Series
from daemon.recent import KEPT, Reading, Recent, quantile, read, since
from tests.daemon.host import METRICS, Host, view

BOUNDS = (1.0, 2.0, 4.0)
SNMP = """Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm RtoMin InSegs OutSegs RetransSegs
Tcp: 1 200 900 1234 5
Udp: InDatagrams
Udp: 7
"""


def times(*cumulative: int) -> Distribution:
    """The last is the count."""
    return Distribution(cumulative[:-1], cumulative[-1], float(cumulative[-1]))


def counts(at: float, **groups: int) -> Reading:
    return Reading(at, {recent.OPENED: {(name,): number for name, number in groups.items()}})


def test_every_family_that_is_kept_exists_with_these_labels() -> None:
    own = {recent.LOST, recent.RUNS, recent.RUN_TIME}
    assert set(METRICS) == set(KEPT) - own
    for name in set(KEPT) - own - {recent.WAIT}:  # its label is an option
        assert set(KEPT[name]) <= set(METRICS[name].labels), name


def test_groups_add_up_and_keep_no_exemplar() -> None:
    metric = Metric("m", "histogram", "M.", ("a", "b"), "seconds", BOUNDS)
    exemplars = {0: Exemplar((("pid", "1"),), 1.0, 1.0)}
    one = Distribution((1, 1, 2), 3, 2.5, exemplars)
    family = Family(metric, [Series(("x", "1"), one), Series(("x", "2"), one), Series(("y", "1"), one)])
    assert recent.grouped(family, ("a",)) == {
        ("x",): Distribution((2, 2, 4), 6, 5.0),
        ("y",): Distribution((1, 1, 2), 3, 2.5),
    }
    assert recent.grouped(family, ("cgroup",)) == {(): Distribution((3, 3, 6), 9, 7.5)}


def test_what_came_in_between() -> None:
    change = since(counts(12.0, inbound=9, outbound=4), counts(2.0, inbound=7))
    assert (change.seconds, change.values) == (10.0, {recent.OPENED: {("inbound",): 2, ("outbound",): 4}})


def test_counts_that_fell_began_again() -> None:
    assert since(counts(2.0, inbound=3), counts(1.0, inbound=7)).values[recent.OPENED] == {("inbound",): 3}
    old, new = (
        Reading(at, {recent.DISK: {(): times(*value)}}) for at, value in ((1.0, (4, 5, 5, 5)), (2.0, (1, 1, 2, 2)))
    )
    assert since(new, old).values[recent.DISK] == {(): times(1, 1, 2, 2)}


def test_a_collector_that_was_down_did_not_count_all_of_it_now() -> None:
    assert since(counts(2.0, inbound=3), Reading(1.0, {})).values == {}


def test_what_a_cgroup_that_is_gone_had_counted_did_not_come_now() -> None:
    old = Reading(1.0, {recent.WAIT: {("other",): times(5, 5, 5, 5), ("/a",): times(20, 20, 20, 20)}})
    new = Reading(2.0, {recent.WAIT: {("other",): times(27, 27, 27, 27)}})
    assert since(new, old).values[recent.WAIT] == {("other",): times(2, 2, 2, 2)}


def test_a_disk_that_is_gone_took_its_counts_with_it() -> None:
    old = Reading(1.0, {recent.DISK: {("other", "other"): times(5, 5, 5, 5), ("sda", "read"): times(20, 20, 20, 20)}})
    new = Reading(2.0, {recent.DISK: {("other", "other"): times(6, 6, 6, 6)}})
    assert since(new, old).values[recent.DISK] == {("other", "other"): Distribution((1, 1, 1), 1, 1.0)}


@pytest.mark.parametrize(
    ("share", "value", "expected"),
    [
        (0.5, times(4, 4, 4, 4), 0.5),  # from 0 to the first bound
        (0.5, times(0, 0, 10, 10), 3.0),
        (0.99, times(99, 99, 100, 100), 1.0),
        (0.995, times(99, 99, 100, 100), 3.0),
        (0.99, times(0, 0, 0, 7), float("inf")),
    ],
)
def test_quantiles_are_those_of_prometheus(share: float, value: Distribution, expected: float) -> None:
    assert quantile(share, BOUNDS, value) == pytest.approx(expected)


def test_segments_that_were_sent() -> None:
    assert recent.out_segments(SNMP) == 1234
    assert recent.out_segments("Udp: 1\n") is None
    assert recent.out_segments("") is None


def test_a_family_of_many_label_sets_is_kept_as_one_sum() -> None:
    metric = Metric(recent.OPENED, "counter", "Opened.", ("direction",))
    many = Family(metric, [Series((str(i),), 2) for i in range(recent.MOST_GROUPS + 1)])
    assert read([many], 0.0).values == {recent.OPENED: {(): 2 * (recent.MOST_GROUPS + 1)}}


def test_the_window_is_ten_seconds_where_there_are_so_many() -> None:
    past = Recent()
    assert past.now(counts(0.0, inbound=1)).change is None
    seconds = []
    for at in range(0, 40, 5):
        past.keep(counts(float(at), inbound=at))
        change = past.now(counts(at + 1.0, inbound=at)).change
        assert change
        seconds.append(change.seconds)
    assert seconds == [1.0, 6.0, 11.0, 11.0, 11.0, 11.0, 11.0, 11.0]


def test_a_reading_is_due_every_five_seconds_also_where_the_clock_is_a_little_early() -> None:
    past = Recent()
    assert past.due(0.0)
    past.keep(counts(0.0))
    assert [past.due(at) for at in (0.3, 4.0, 4.9, 6.0)] == [False, False, True, True]


def test_the_past_is_bounded() -> None:
    host, past = Host(), Recent()
    for step in range(3 * recent.POINTS):
        host.step() if step < 3 else None
        past.keep(read(host.families(), 5.0 * step))
    now = past.now(read(host.families(), 5.0 * 3 * recent.POINTS))
    assert len(now.points) == recent.POINTS
    assert sum(sys.getsizeof(one) for one in now.points) < 16 << 10
    assert len(past._readings) == recent.READINGS


def test_points_tell_the_slowest_disk_and_rates() -> None:
    calm, slow = view(Host()).now.points[-1], view(Host(), trouble=2).now.points[-1]
    assert calm.disk_p99
    assert slow.disk_p99
    assert calm.disk_p99 < 0.01 < 0.25 < slow.disk_p99
    assert (slow.opened, slow.kills, slow.errors) == (24 / 5, 0, 0)
    assert 0 < slow.misses < slow.accesses


def test_a_kill_is_told_at_once_and_then_for_the_minutes_that_are_kept() -> None:
    host, past = Host(), Recent()
    host.kill()  # before anybody looked
    for at in (0.0, 5.0):
        past.keep(read(host.families(), at))
    assert past.now(read(host.families(), 6.0)).kills == 0
    host.kill()
    assert past.now(read(host.families(), 7.0)).kills == 1
    past.keep(read(host.families(), 10.0))
    assert past.now(read(host.families(), 11.0)).kills == 1


def test_requests_that_a_disk_does_not_support_are_no_failures() -> None:
    errors = {("sda", "discard", "notsupp"): 4, ("sda", "read", "eagain"): 2, ("sda", "read", "medium"): 1}
    assert recent.faults({recent.ERRORS: errors}) == 1


def test_what_lasts_beyond_all_bounds_has_a_place_on_the_line() -> None:
    value = Distribution((0,) * len(SECONDS.bounds), 100, 9000.0)
    change = recent.Change(5.0, {recent.DISK: {("sda", "read"): value}})
    assert recent.point(1.0, change, {recent.DISK: SECONDS.bounds}).disk_p99 == 2 * SECONDS.bounds[-1]
