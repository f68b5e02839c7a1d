# SPDX-License-Identifier: Apache-2.0
"""The C of bpf/include/histogram.h, run by the kernel, against daemon.histogram's exact arithmetic."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import layout, libbpf, loader
from daemon.attach import _with_includes
from daemon.compiler import compile_text
from daemon.errors import UnsupportedError
from daemon.histogram import BYTES, SECONDS, Scale

pytestmark = pytest.mark.kernel

PROGRAMS = """
#include "program.h"
#include "histogram.h"

struct both {
	struct seconds_histogram seconds;
	struct bytes_histogram bytes;
};
BPF_ARRAY(both, struct both, 1);

PROGRAM(slots)
{
	u32 seconds = seconds_slot(ctx[0]), bytes = bytes_slot(ctx[0]);

	return seconds | bytes << 8 | OCTAVE_OF(seconds) << 16 | OCTAVE_OF(bytes) << 24;
}

PROGRAM(observe)
{
	int first = 0;
	struct both *into = both.lookup(&first);
	u32 seconds, bytes;

	if (!into)
		return 0;
	seconds = OBSERVE_SECONDS(&into->seconds, ctx[0]);
	bytes = OBSERVE_BYTES(&into->bytes, ctx[0]);
	return seconds << 16 | bytes << 24;
}
"""


class TestRunOpts(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf 1.0."""

    __test__ = False
    _fields_ = (
        ("sz", ctypes.c_size_t), ("data_in", ctypes.c_void_p), ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32), ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p), ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32), ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32), ("repeat", ctypes.c_int), ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32),
    )  # fmt: skip


class Slots(NamedTuple):
    seconds: int
    bytes: int
    seconds_octave: int
    bytes_octave: int


def expected(value: int) -> Slots:
    return Slots(SECONDS.slot(value), BYTES.slot(value), SECONDS.octave(value), BYTES.octave(value))


class Kernel:
    """The two programs, loaded and not attached: each run takes one value."""

    def __init__(self, text: str, *flags: str) -> None:
        self._library = ctypes.CDLL("libbpf.so.1")
        self._compiled = compile_text(text, ["-DGENERATION=0ULL", *flags])
        self._programs = {
            name: libbpf.prog_load(name, libbpf.PROG_TYPE_RAW_TRACEPOINT, code)
            for name, code in self._compiled.functions.items()
        }

    def close(self) -> None:
        for program in self._programs.values():
            os.close(program)

    def run(self, name: str, value: int) -> Slots:
        """int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *): ctx[0] is the value."""
        context = ctypes.c_uint64(value)
        options = TestRunOpts(sz=ctypes.sizeof(TestRunOpts), ctx_in=ctypes.addressof(context), ctx_size_in=8)
        result = self._library.bpf_prog_test_run_opts(self._programs[name], ctypes.byref(options))
        assert result == 0, os.strerror(-result)
        return Slots(*struct.pack("<I", options.retval))

    def histograms(self) -> dict[str, Any]:
        """struct both."""
        one = self._compiled.maps["both"]
        raw = libbpf.map_lookup(one.descriptor, bytes(4), layout.size(one.value))
        assert raw is not None
        decoded: dict[str, Any] = layout.decoder(one.value)(raw)
        return decoded


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, lacks: Callable[[str], None]) -> Iterator[Callable[..., Kernel]]:
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    source = tmp_path_factory.mktemp("histogram") / "slots.bpf.c"
    source.write_text(PROGRAMS)
    made: list[Kernel] = []

    def make(*flags: str) -> Kernel:
        made.append(Kernel(_with_includes(source), *flags))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def slots(kernel: Callable[..., Kernel]) -> Callable[[int], Slots]:
    loaded = kernel()
    return lambda value: loaded.run("slots", value)


def ends(scale: Scale) -> Iterator[int]:
    """The largest value of each slot: the floor of its bound."""
    low = 0
    for slot in range(scale.slots):
        high = (scale.unit << scale.octaves) * 2
        while low + 1 < high:  # scale.slot(low) <= slot < scale.slot(high)
            middle = (low + high) // 2
            low, high = (middle, high) if scale.slot(middle) <= slot else (low, middle)
        yield low


def differences(slots: Callable[[int], Slots], values: Iterable[int]) -> list[tuple[int, Slots, Slots]]:
    return [(value, slots(value), expected(value)) for value in values if slots(value) != expected(value)]


def test_every_bound_and_its_neighbours(slots: Callable[[int], Slots]) -> None:
    for scale in (SECONDS, BYTES):
        bounds = list(ends(scale))
        assert len(bounds) == scale.slots
        assert not differences(slots, (end + step for end in bounds for step in (-1, 0, 1) if end + step >= 0))


def test_corners(slots: Callable[[int], Slots]) -> None:
    powers = [1 << bit for bit in range(64)]
    corners = [0, 1, 2, 953, 954, 955, SECONDS.unit - 1, SECONDS.unit, SECONDS.unit + 1, 32 * SECONDS.unit + 1]
    neighbours = [power + step for power in powers for step in (-1, 0, 1)]
    assert not differences(slots, [*corners, *neighbours, (1 << 64) - 1])


def test_random_values_of_every_magnitude(slots: Callable[[int], Slots]) -> None:
    numbers = random.Random(3)
    assert not differences(slots, (numbers.getrandbits(numbers.randint(1, 64)) for _ in range(10_000)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=20, max_size=20))
def test_any_value(slots: Callable[[int], Slots], values: list[int]) -> None:
    assert not differences(slots, values)


@pytest.mark.parametrize("flags", [(), ("-DPLAIN_INCREMENTS",)], ids=["atomic", "plain"])
def test_what_is_observed_is_what_is_read(kernel: Callable[..., Kernel], flags: tuple[str, ...]) -> None:
    loaded = kernel(*flags)
    numbers = random.Random(5)
    values = [0, 953, 954, 32 * SECONDS.unit, 32 * SECONDS.unit + 1, 1 << 30, (1 << 30) + 1]
    values += [numbers.getrandbits(numbers.randint(1, 40)) for _ in range(500)]
    for value in values:
        octaves = loaded.run("observe", value)[2:]
        assert octaves == expected(value)[2:]
    histograms = loaded.histograms()
    for name, scale in (("seconds", SECONDS), ("bytes", BYTES)):
        raw = histograms[name]
        inside = [scale.slot(value) for value in values]
        assert raw["slots"] == [inside.count(slot) for slot in range(scale.slots)]
        assert raw["overflow"] == inside.count(scale.slots)
        assert raw["sum"] == sum(values)
        decoded = scale.distribution(raw["slots"], raw["overflow"], raw["sum"])
        assert decoded.count == len(values)
        for bound, count in zip(scale.bounds, decoded.cumulative, strict=True):
            assert count == sum(value <= bound * scale.unit for value in values)
