# SPDX-License-Identifier: Apache-2.0
"""The maths of the project's one histogram: slots, bounds, conversion to base units.

`bpf/include/histogram.h` is its twin in the kernel; a test runs both on the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from daemon.model import Distribution, Exemplar

SCHEMA = 3
SLOTS_PER_OCTAVE = 1 << SCHEMA


@dataclass(frozen=True, slots=True)
class Scale:
    """A histogram's slots: slot 0 ends at 2^first, each of `octaves` octaves above it has eight.

    `unit` is how many raw units (ns, bytes) a base unit (s, byte) has.
    """

    unit: int
    first: int
    octaves: int

    @property
    def slots(self) -> int:
        return self.octaves * SLOTS_PER_OCTAVE + 1

    @property
    def bounds(self) -> tuple[float, ...]:
        """The classic `le` bounds: the octaves' ends in base units, exact in a double."""
        return tuple(2.0 ** (self.first + i) for i in range(self.octaves + 1))

    def slot(self, value: int) -> int:
        """The slot of a raw value, `slots` for overflow, in exact arithmetic.

        Slot i ends at 2^(first + i/8) base units: value <= unit * 2^(first + i/8), both sides to the eighth.
        """
        shift = max(0, -self.first)
        left = (value << shift) ** SLOTS_PER_OCTAVE
        right = (self.unit << (shift + self.first)) ** SLOTS_PER_OCTAVE
        for slot in range(self.slots):
            if left <= right << slot:
                return slot
        return self.slots

    def slot_bound(self, slot: int) -> float:
        """The inclusive upper bound of a slot, in base units (rounded to a double)."""
        return float(2.0 ** (self.first + slot / SLOTS_PER_OCTAVE))

    def octave(self, value: int) -> int:
        """Index of the classic bucket of a raw value; `octaves + 1` is +Inf."""
        return (self.slot(value) + SLOTS_PER_OCTAVE - 1) // SLOTS_PER_OCTAVE

    def distribution(
        self, slots: Sequence[int], overflow: int, total: int, exemplars: Mapping[int, Exemplar] | None = None
    ) -> Distribution:
        """A kernel histogram (slots, overflow, sum in raw units) as cumulative classic buckets in base units."""
        octaves = [slots[0]]
        octaves += [sum(slots[i : i + SLOTS_PER_OCTAVE]) for i in range(1, self.slots, SLOTS_PER_OCTAVE)]
        cumulative = tuple(accumulate(octaves))
        return Distribution(cumulative, cumulative[-1] + overflow, total / self.unit, exemplars or {})

    @property
    def empty(self) -> Distribution:
        return Distribution((0,) * (self.octaves + 1), 0, 0.0)


@dataclass(frozen=True, slots=True)
class Counts:
    """A kernel histogram as it was read. Whole numbers, so that several add up to the same in any order."""

    scale: Scale
    slots: Sequence[int]
    overflow: int
    total: int
    exemplars: Mapping[int, Exemplar]

    def __add__(self, other: Counts) -> Counts:
        slots = [a + b for a, b in zip(self.slots, other.slots, strict=True)]
        exemplars = newest(self.exemplars, other.exemplars)
        return Counts(self.scale, slots, self.overflow + other.overflow, self.total + other.total, exemplars)

    def distribution(self) -> Distribution:
        return self.scale.distribution(self.slots, self.overflow, self.total, self.exemplars)


SECONDS = Scale(unit=1_000_000_000, first=-20, octaves=25)
BYTES = Scale(unit=1, first=0, octaves=30)


def buckets(value: Distribution) -> list[int]:
    """What each bucket counts for itself; the last one is above every bound."""
    ends = (*value.cumulative, value.count)
    return [after - before for before, after in zip((0, *value.cumulative), ends, strict=True)]


def newest(left: Mapping[int, Exemplar], right: Mapping[int, Exemplar]) -> dict[int, Exemplar]:
    """Of two exemplars of a bucket the newer one."""
    exemplars = dict(left)
    for bucket, exemplar in right.items():
        if bucket not in exemplars or exemplars[bucket].timestamp < exemplar.timestamp:
            exemplars[bucket] = exemplar
    return exemplars


def add(left: Distribution, right: Distribution) -> Distribution:
    """Both together, for a picture: the sum is rounded, so what Prometheus gets is added as `Counts`."""
    exemplars = newest(left.exemplars, right.exemplars)
    cumulative = tuple(a + b for a, b in zip(left.cumulative, right.cumulative, strict=True))
    return Distribution(cumulative, left.count + right.count, left.sum + right.sum, exemplars)
