# SPDX-License-Identifier: Apache-2.0
"""bcc's descriptions of C structs to layouts, bytes to values, and the values of several CPUs to one."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.layout import Layout, decoder, from_bcc, merge, size

INTEGERS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s8": "b", "s16": "h", "s32": "i", "s64": "q"}
WORD = "unsigned long long"
WORDS = {"stamp_ns": 1, "time_ns": 1, "value": 1, "pid": 1, "comm": 2, "cgroup": 1, "words": 1, "check": 1}
EXEMPLAR = from_bcc(
    ["exemplar", [[name, WORD, *([[WORDS[name]]] if name in ("comm", "words") else [])] for name in WORDS], "struct"]
)


def exemplar(*words: int) -> bytes:
    """struct exemplar, folded as bpf/include/exemplar.h does: `words` are those after the stamp."""
    check = 0
    for word in words:
        check = ((check << 7) | (check >> 57)) % 2**64 ^ word
    return struct.pack(f"={len(words) + 2}Q", 99, *words, check)


# from_bcc


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("char", "s8"), ("unsigned char", "u8"), ("_Bool", "u8"), ("short", "s16"), ("unsigned short", "u16"),
        ("int", "s32"), ("unsigned int", "u32"), ("enum", "u32"), ("long", "s64"), ("unsigned long", "u64"),
        ("long long", "s64"), ("unsigned long long", "u64"), ("struct task_struct", "u64"),
    ],
)  # fmt: skip
def test_c_types(name: str, expected: str) -> None:
    assert from_bcc(name) == expected


def test_padding_is_no_field() -> None:
    description = ["key", [["a", "unsigned int"], ["__pad_1", "char", [4]], ["b", WORD]], "struct_packed"]
    layout = from_bcc(description)
    assert layout == ["struct", "key", 16, {"a": [0, "u32"], "b": [8, "u64"]}]
    assert decoder(layout)(struct.pack("=I4xQ", 7, 9)) == {"a": 7, "b": 9}


def test_arrays_and_structs_inside() -> None:
    inner = ["level", [["name", "char", [8]]], "struct_packed"]
    layout = from_bcc(["outer", [["path", inner, [2]], ["slots", "unsigned long long", [3]]], "struct_packed"])
    assert size(layout) == 40
    raw = b"inner\0\0\0" + b"outer\0\0\0" + struct.pack("=3Q", 1, 2, 3)
    assert decoder(layout)(raw) == {"path": [{"name": b"inner\0\0\0"}, {"name": b"outer\0\0\0"}], "slots": [1, 2, 3]}


# decoder: any struct, there and back


@st.composite
def structs(draw: st.DrawFn, depth: int = 2) -> tuple[Layout, bytes, Any]:
    """A layout, bytes of it, and their value."""
    entries: dict[str, Any] = {}
    raw, values = b"", {}
    for name in draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)):
        raw += bytes(draw(st.integers(0, 3)))  # padding
        layout, some, value = draw(fields(depth))
        entries[name] = [len(raw), layout]
        raw, values[name] = raw + some, value
    raw += bytes(draw(st.integers(0, 7)))
    return ["struct", "any", len(raw), entries], raw, values


@st.composite
def fields(draw: st.DrawFn, depth: int) -> tuple[Layout, bytes, Any]:
    kind = draw(st.sampled_from(["integer", "bytes", "integers"] + ["struct", "structs"] * (depth > 0)))
    if kind == "bytes":
        raw = draw(st.binary(min_size=1, max_size=16))
        return ["bytes", len(raw)], raw, raw
    if kind == "struct":
        return draw(structs(depth - 1))
    if kind == "structs":
        layout, raw, value = draw(structs(depth - 1))
        count = draw(st.integers(1, 3))
        return ["array", count, layout], raw * count, [value] * count
    name = draw(st.sampled_from(sorted(INTEGERS)))
    bits, signed = int(name[1:]), name[0] == "s"
    numbers = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)
    if kind == "integer":
        value = draw(numbers)
        return name, struct.pack("=" + INTEGERS[name], value), value
    values = draw(st.lists(numbers, min_size=1, max_size=5))
    return ["array", len(values), name], struct.pack(f"={len(values)}{INTEGERS[name]}", *values), values


@given(structs())
def test_what_was_packed_is_read(case: tuple[Layout, bytes, Any]) -> None:
    layout, raw, value = case
    assert size(layout) == len(raw)
    assert decoder(layout)(raw) == value


# exemplars


def test_exemplar_is_read() -> None:
    found = decoder(EXEMPLAR)(exemplar(5, 6, 7, 8, 9, 10, 11))
    assert found == {
        "stamp_ns": 99, "time_ns": 5, "value": 6, "pid": 7, "comm": [8, 9], "cgroup": 10, "words": [11],
        "check": found["check"],
    }  # fmt: skip


def test_exemplar_that_was_never_written_is_none() -> None:
    assert decoder(EXEMPLAR)(bytes(size(EXEMPLAR))) is None


@given(st.integers(1, 7), st.integers(1, 2**64 - 1))
def test_torn_exemplar_is_none(word: int, noise: int) -> None:
    """Any one word of another writing."""
    raw = bytearray(exemplar(5, 6, 7, 8, 9, 10, 11))
    old = int.from_bytes(raw[word * 8 : word * 8 + 8], "little")
    raw[word * 8 : word * 8 + 8] = (old ^ noise).to_bytes(8, "little")
    assert decoder(EXEMPLAR)(bytes(raw)) is None


@given(st.lists(st.integers(1, 2**64 - 1), min_size=7, max_size=7), st.integers(1, 6))
def test_exemplar_of_two_halves_is_none(words: list[int], half: int) -> None:
    first, second = [5, 6, 7, 8, 9, 10, 11], words
    mixed = exemplar(*first)[: 8 + 8 * half] + exemplar(*second)[8 + 8 * half :]
    found = decoder(EXEMPLAR)(mixed)
    assert found is None or mixed[8:] in (exemplar(*first)[8:], exemplar(*second)[8:])


# merge


def test_integers_add_up() -> None:
    assert merge([1, 2, 3]) == 6
    assert merge([[1, 2], [10, 20]]) == [11, 22]
    assert merge([{"a": 1, "b": [1]}, {"a": 2, "b": [5]}]) == {"a": 3, "b": [6]}
    assert merge([[{"a": 1}, {"a": 2}], [{"a": 10}, {"a": 20}]]) == [{"a": 11}, {"a": 22}]


def test_one_value_stays_as_it_is() -> None:
    value = {"path": [{"name": b"x"}]}
    assert merge([value]) is value
    assert merge([]) is None


def test_of_texts_the_first_that_is_not_empty_stays() -> None:
    assert merge([{"name": b"\0\0"}, {"name": b"a\0"}, {"name": b"b\0"}]) == {"name": b"a\0"}
    assert merge([b"\0\0", b"\0\0"]) == b"\0\0"


def test_of_exemplars_the_newest_stays() -> None:
    old, new = ({"stamp_ns": 9, "time_ns": time, "value": time} for time in (1, 2))
    assert merge([old, new]) == merge([new, old]) == new
    assert merge([None, old]) == old
    assert merge([None, None]) is None
    assert merge([[old, None], [None, new]]) == [old, new]


@given(st.lists(st.fixed_dictionaries({"slots": st.lists(st.integers(0, 2**60), min_size=4, max_size=4),
                                       "sum": st.integers(0, 2**60)}), min_size=1, max_size=8))  # fmt: skip
def test_order_of_cpus_does_not_matter(values: list[dict[str, Any]]) -> None:
    assert merge(values) == merge(values[::-1])
    assert merge(values)["sum"] == sum(value["sum"] for value in values)
