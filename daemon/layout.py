# SPDX-License-Identifier: Apache-2.0
"""How a map's bytes read: from bcc's description of the C struct to Python values, CPUs merged.

A layout is plain JSON, so that the manifest can hold it:
    "u64"                                   an integer: u8 to u64, s8 to s64
    ["bytes", n]                            char[n]
    ["array", n, layout]                    layout[n]
    ["struct", name, size, {field: [offset, layout]}]
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

Layout = Any
Decode = Callable[[bytes], Any]

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s8": "b", "s16": "h", "s32": "i", "s64": "q"}
_C_NAMES = {
    "char": "s8", "signed char": "s8", "unsigned char": "u8", "_Bool": "u8", "short": "s16", "unsigned short": "u16",
    "int": "s32", "unsigned int": "u32", "enum": "u32", "long": "s64", "unsigned long": "u64", "long long": "s64",
    "unsigned long long": "u64",
}  # fmt: skip


def from_bcc(description: Any) -> Layout:
    """bcc's `["name", [["field", type, [count]], …], "struct_packed"]`, where padding is spelled out as fields."""
    if isinstance(description, str):
        return _C_NAMES.get(description, "u64")  # pointers are described by what they point to, or as u64
    name, fields = description[0], description[1]
    offset, entries = 0, {}
    for field in fields:
        layout = from_bcc(field[1])
        if len(field) > 2 and isinstance(field[2], list):
            count = field[2][0]  # of an array of arrays bcc tells the first bound only; `load` checks the size
            layout = ["bytes", count] if field[1] == "char" else ["array", count, layout]
        if not field[0].startswith("__pad"):
            entries[field[0]] = [offset, layout]
        offset += size(layout)
    return ["struct", name, offset, entries]


def size(layout: Layout) -> int:
    """sizeof."""
    if isinstance(layout, str):
        return struct.calcsize(_FORMATS[layout])
    if layout[0] == "bytes":
        return int(layout[1])
    if layout[0] == "array":
        return int(layout[1]) * size(layout[2])
    return int(layout[2])


def decoder(layout: Layout) -> Decode:
    """A function from one value's bytes to ints, bytes, lists and dicts. A torn or unused exemplar is None."""
    if isinstance(layout, str):
        unpack = struct.Struct("=" + _FORMATS[layout]).unpack
        return lambda raw: unpack(raw)[0]
    if layout[0] == "bytes":
        return bytes
    if layout[0] == "array":
        return _array_decoder(layout)
    fields = [(name, offset, offset + size(inner), decoder(inner)) for name, (offset, inner) in layout[3].items()]

    def decode(raw: bytes) -> Any:
        return {name: read(raw[start:end]) for name, start, end, read in fields}

    if layout[1] == "exemplar":
        return lambda raw: _exemplar(raw, decode)
    return decode


def _array_decoder(layout: Layout) -> Decode:
    _, count, inner = layout
    if isinstance(inner, str):
        unpack = struct.Struct(f"={count}{_FORMATS[inner]}").unpack
        return lambda raw: list(unpack(raw))
    step, read = size(inner), decoder(inner)
    return lambda raw: [read(raw[i : i + step]) for i in range(0, count * step, step)]


def _exemplar(raw: bytes, decode: Decode) -> Any:
    """struct exemplar: words 1 to n-1 folded must give the last one (bpf/include/exemplar.h)."""
    words = memoryview(raw).cast("Q")
    if not words[1]:
        return None
    check = 0
    for word in words[1:-1]:
        check = ((check << 7 | check >> 57) & 0xFFFFFFFFFFFFFFFF) ^ word
    return decode(raw) if check == words[-1] else None


def merge(values: Sequence[Any]) -> Any:
    """One value of several CPUs': integers add up, of exemplars the newest stays, of bytes the first not empty."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return present[0] if present else None
    first = present[0]
    if isinstance(first, int):
        return sum(present)
    if isinstance(first, bytes):
        return next((value for value in present if any(value)), first)
    if isinstance(first, list):
        if first and isinstance(first[0], int):
            return list(map(sum, zip(*present, strict=True)))
        return [merge(column) for column in zip(*present, strict=True)]
    if "stamp_ns" in first:
        return max(present, key=lambda exemplar: int(exemplar["time_ns"]))
    return {name: merge([value[name] for value in present]) for name in first}
