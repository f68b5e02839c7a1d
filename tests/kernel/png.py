# SPDX-License-Identifier: Apache-2.0
"""A screenshot in few bytes: 256 colours are enough for text and flat surfaces."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial

_COLOURS = 256
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def small(raw: bytes) -> bytes:
    """The same picture as a palette; what is rare takes the colour next to it. RGB or RGBA of 8 bits, no interlace."""
    chunks = list(_chunks(raw))
    width, height, depth, kind, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, interlace) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    rows = _rows(zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT")), width, height, size)
    pixels = [[bytes(row[i : i + 3]) for i in range(0, len(row), size)] for row in rows]
    seen = Counter(pixel for row in pixels for pixel in row).most_common()
    palette = [colour for colour, _ in seen[:_COLOURS]]
    place = {colour: i for i, colour in enumerate(palette)}
    for colour, _ in seen[_COLOURS:]:
        place[colour] = place[min(palette, key=partial(_distance, colour))]
    lines = b"".join(b"\0" + bytes(place[pixel] for pixel in row) for row in pixels)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", b"".join(palette)),
            _chunk(b"IDAT", zlib.compress(lines, 9)),
            _chunk(b"IEND", b""),
        )
    )


def _distance(one: bytes, other: bytes) -> int:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def _chunks(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert raw.startswith(_SIGNATURE)
    at = len(_SIGNATURE)
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        yield raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        at += length + 12


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _rows(raw: bytes, width: int, height: int, size: int) -> Iterator[bytearray]:
    """Takes the filters back (PNG, 9.2)."""
    stride = width * size
    above = bytearray(stride)
    for number in range(height):
        at = number * (stride + 1)
        kind, line = raw[at], bytearray(raw[at + 1 : at + 1 + stride])
        for i in range(stride):
            left = line[i - size] if i >= size else 0
            corner = above[i - size] if i >= size else 0
            line[i] = (line[i] + _guess(kind, left, above[i], corner)) & 0xFF
        yield line
        above = line


def _guess(kind: int, left: int, up: int, corner: int) -> int:
    match kind:
        case 0:
            return 0
        case 1:
            return left
        case 2:
            return up
        case 3:
            return (left + up) // 2
        case _:
            guess = left + up - corner
            return min((left, up, corner), key=lambda one: abs(guess - one))
