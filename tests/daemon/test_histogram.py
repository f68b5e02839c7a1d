# SPDX-License-Identifier: Apache-2.0
"""The maths of slots and bounds, against decimal arithmetic of sixty digits and plain counting."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.histogram import BYTES, SECONDS, SLOTS_PER_OCTAVE, Scale, add
from daemon.model import Distribution, Exemplar

SCALES = [pytest.param(SECONDS, id="seconds"), pytest.param(BYTES, id="bytes")]
SMALL = Scale(unit=10, first=-1, octaves=2)  # slots end at 5, 5.45, 5.9, …, 10, …, 20

values = st.one_of(st.integers(0, 1 << 64), st.integers(0, 64).flatmap(lambda bits: st.integers(0, 1 << bits)))


def bound(scale: Scale, slot: int) -> Decimal:
    """unit * 2^(first + slot / 8)"""
    with localcontext() as context:
        context.prec = 60
        return scale.unit * Decimal(2) ** (scale.first + Decimal(slot) / SLOTS_PER_OCTAVE)


def exemplar(value: float, timestamp: float) -> Exemplar:
    return Exemplar((("pid", "1"),), value, timestamp)


def test_bounds_are_powers_of_two_from_a_microsecond_to_half_a_minute() -> None:
    assert SECONDS.bounds[0] == 2**-20
    assert SECONDS.bounds[-1] == 32
    assert BYTES.bounds[0] == 1
    assert BYTES.bounds[-1] == 1 << 30
    for scale in (SECONDS, BYTES):
        assert len(scale.bounds) == scale.octaves + 1
        assert all(after == 2 * before for before, after in zip(scale.bounds, scale.bounds[1:], strict=False))


@pytest.mark.parametrize("scale", SCALES)
def test_slot_bounds_are_exact_at_octaves(scale: Scale) -> None:
    assert tuple(scale.slot_bound(slot) for slot in range(0, scale.slots, SLOTS_PER_OCTAVE)) == scale.bounds
    for slot in range(scale.slots):
        assert scale.slot_bound(slot) == pytest.approx(float(bound(scale, slot)) / scale.unit, rel=1e-15)


@pytest.mark.parametrize("scale", SCALES)
def test_bounds_are_inclusive(scale: Scale) -> None:
    for slot in range(scale.slots):
        floor = int(bound(scale, slot))
        assert scale.slot(floor) <= slot
        assert scale.slot(floor + 1) > slot
    for octave, end in enumerate(scale.bounds):
        exact = end * scale.unit
        if exact == int(exact):
            assert scale.octave(int(exact)) == octave
            assert scale.octave(int(exact) + 1) == octave + 1


@pytest.mark.parametrize("scale", SCALES)
def test_both_ends(scale: Scale) -> None:
    assert scale.slot(0) == scale.octave(0) == 0
    last = scale.unit << (scale.first + scale.octaves)
    assert (scale.slot(last), scale.octave(last)) == (scale.slots - 1, scale.octaves)
    assert (scale.slot(last + 1), scale.octave(last + 1)) == (scale.slots, scale.octaves + 1)


@given(value=values)
def test_a_value_lies_between_its_slots_bounds(value: int) -> None:
    for scale in (SECONDS, BYTES):
        slot = scale.slot(value)
        assert slot == scale.slots or value <= bound(scale, slot)
        assert slot == 0 or value > bound(scale, slot - 1)


@given(value=values)
def test_the_octave_is_the_classic_bucket(value: int) -> None:
    for scale in (SECONDS, BYTES):
        ends = [scale.unit * Decimal(2) ** (scale.first + i) for i in range(scale.octaves + 1)]
        assert scale.octave(value) == sum(value > end for end in ends)


@given(st.lists(st.integers(0, 25)))
def test_a_distribution_counts_each_value_once(observed: list[int]) -> None:
    slots = [0] * (SMALL.slots + 1)
    for value in observed:
        slots[SMALL.slot(value)] += 1
    found = SMALL.distribution(slots[:-1], slots[-1], sum(observed))
    assert found.cumulative == tuple(sum(value <= end * SMALL.unit for value in observed) for end in SMALL.bounds)
    assert found.count == len(observed)
    assert found.sum == sum(observed) / SMALL.unit


def test_a_distribution_of_nothing_is_the_empty_one() -> None:
    assert SECONDS.distribution([0] * SECONDS.slots, 0, 0) == SECONDS.empty


def test_the_sum_is_in_base_units() -> None:
    slots = [1] + [0] * (SECONDS.slots - 1)
    assert SECONDS.distribution(slots, 2, 2_500_000_000).sum == 2.5
    assert BYTES.distribution([0] * BYTES.slots, 1, 1 << 40).sum == 2**40


@given(st.lists(st.integers(0, 25)), st.lists(st.integers(0, 25)))
def test_added_distributions_are_that_of_all_values(left: list[int], right: list[int]) -> None:
    def of(observed: list[int]) -> Distribution:
        slots = [0] * (SMALL.slots + 1)
        for value in observed:
            slots[SMALL.slot(value)] += 1
        return SMALL.distribution(slots[:-1], slots[-1], sum(observed))

    both, together = add(of(left), of(right)), of(left + right)
    assert (both.cumulative, both.count) == (together.cumulative, together.count)
    assert both.sum == pytest.approx(together.sum)


def test_of_two_exemplars_of_a_bucket_the_newer_stays() -> None:
    old, new = exemplar(0.1, 1.0), exemplar(0.2, 2.0)
    empty = SMALL.empty
    one = Distribution(empty.cumulative, 0, 0.0, {0: old, 1: new})
    two = Distribution(empty.cumulative, 0, 0.0, {0: new, 1: old, 3: old})
    assert add(one, two).exemplars == {0: new, 1: new, 3: old}
    assert add(two, one).exemplars == {0: new, 1: new, 3: old}


def test_distributions_of_different_scales_do_not_add() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        add(SECONDS.empty, BYTES.empty)
