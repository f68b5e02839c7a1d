# SPDX-License-Identifier: Apache-2.0
"""C types of the running kernel, from its own BTF: offsets are right by construction.

A collector names structs and fields; `header` writes C structs that hold these fields where this kernel has them,
with explicit padding between. What the kernel lacks is told, so that the next variant can be chosen.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from daemon.errors import UnsupportedError
from daemon.libbpf import _lib

VMLINUX = Path("/sys/kernel/btf/vmlinux")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO = range(1, 14)
TYPE_TAG, ENUM64 = 18, 19
_TRANSPARENT = frozenset({TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})


class _Type(ct.Structure):
    """struct btf_type: { __u32 name_off; __u32 info; __u32 size_or_type; }"""

    _fields_ = (("name_off", ct.c_uint32), ("info", ct.c_uint32), ("size", ct.c_uint32))

    @property
    def kind(self) -> int:
        return int(self.info >> 24 & 0x1F)

    @property
    def vlen(self) -> int:
        return int(self.info & 0xFFFF)

    @property
    def kind_flag(self) -> bool:
        return bool(self.info >> 31)


class _Member(ct.Structure):
    """struct btf_member: { __u32 name_off; __u32 type; __u32 offset; }"""

    _fields_ = (("name_off", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32))


class _Array(ct.Structure):
    """struct btf_array: { __u32 type; __u32 index_type; __u32 nelems; }"""

    _fields_ = (("type", ct.c_uint32), ("index_type", ct.c_uint32), ("count", ct.c_uint32))


class _Enum(ct.Structure):
    """struct btf_enum: { __u32 name_off; __s32 val; }"""

    _fields_ = (("name_off", ct.c_uint32), ("value", ct.c_int32))


_lib.btf__load_vmlinux_btf.restype = ct.c_void_p
_lib.btf__type_by_id.argtypes = [ct.c_void_p, ct.c_uint32]
_lib.btf__type_by_id.restype = ct.c_void_p
_lib.btf__name_by_offset.argtypes = [ct.c_void_p, ct.c_uint32]
_lib.btf__name_by_offset.restype = ct.c_char_p
_lib.btf__find_by_name_kind.argtypes = [ct.c_void_p, ct.c_char_p, ct.c_uint32]
_lib.btf__resolve_size.argtypes = [ct.c_void_p, ct.c_uint32]
_lib.btf__resolve_size.restype = ct.c_int64


@dataclass(frozen=True, slots=True)
class Field:
    """Where a field lies: offset in bytes from the start of the struct, BTF type id.

    A bit-field of at most one byte is given as the byte that holds it (`<field>_byte`).
    """

    offset: int
    type: int
    bits: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """C text, and the required fields (`struct.field`) or enumerators that this kernel does not have."""

    text: str
    missing: frozenset[str]


class Btf:
    """const struct btf *: the types of the running kernel. Never freed: the process that asks is short-lived."""

    def __init__(self) -> None:
        self._btf = _lib.btf__load_vmlinux_btf()
        if not self._btf:
            raise UnsupportedError(
                f"{VMLINUX} cannot be read; use a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian's are)"
            )

    def _type(self, number: int) -> _Type:
        return _Type.from_address(_lib.btf__type_by_id(self._btf, number))

    def _tail(self, number: int, kind: type[ct.Structure], count: int) -> Iterator[ct.Structure]:
        """The entries that follow a struct btf_type in memory."""
        address = _lib.btf__type_by_id(self._btf, number) + ct.sizeof(_Type)
        return iter((kind * count).from_address(address))

    def _name(self, offset: int) -> str:
        return str(_lib.btf__name_by_offset(self._btf, offset).decode())

    def find(self, name: str, *kinds: int) -> int | None:
        """The id of the type of that name, or None."""
        for kind in kinds:
            number = _lib.btf__find_by_name_kind(self._btf, name.encode(), kind)
            if number > 0:
                return int(number)
        return None

    def _strip(self, number: int) -> int:
        while (entry := self._type(number)).kind in _TRANSPARENT:
            number = entry.size
        return number

    def tracepoint_arguments(self, name: str) -> int | None:
        """How many arguments a tracepoint passes (btf_trace_<name> without its void *), None where it is absent."""
        number = self.find(f"btf_trace_{name}", TYPEDEF)
        if number is None:
            return None
        prototype = self._strip(self._type(self._strip(number)).size)
        return self._type(prototype).vlen - 1

    def function_arguments(self, name: str) -> int | None:
        """How many arguments a kernel function takes, None where BTF does not know it (inlined, not compiled in)."""
        number = self.find(name, FUNC)
        return None if number is None else self._type(self._type(number).size).vlen

    def field(self, struct: str, name: str) -> Field | None:
        """A field by name, also inside anonymous structs and unions. A bit-field over a byte's border is None."""
        number = self.find(struct, STRUCT, UNION)
        return None if number is None else self._field(number, name, 0)

    def _field(self, number: int, name: str, base: int) -> Field | None:
        entry = self._type(number)
        for member in self._tail(number, _Member, entry.vlen):
            bits, offset = 0, member.offset
            if entry.kind_flag:
                bits, offset = offset >> 24, offset & 0xFFFFFF
            place = base + offset // 8
            if member.name_off and self._name(member.name_off) == name:
                if bits and offset % 8 + bits > 8:
                    return None
                return Field(place, member.type, bool(bits))
            inner = self._strip(member.type)
            if not member.name_off and self._type(inner).kind in (STRUCT, UNION):
                found = self._field(inner, name, place)
                if found:
                    return found
        return None

    def enumerator(self, enum: str, name: str) -> int | None:
        """The value of an enumerator of a named enum."""
        number = self.find(enum, ENUM)
        if number is None:
            return None
        for entry in self._tail(number, _Enum, self._type(number).vlen):
            if self._name(entry.name_off) == name:
                return int(entry.value)
        return None

    def _declare(self, number: int, name: str, known: Mapping[str, object]) -> str:
        """C declaration of a field; what is neither scalar, pointer nor a struct of the collector's is bytes."""
        size = int(_lib.btf__resolve_size(self._btf, number))
        number = self._strip(number)
        entry = self._type(number)
        if entry.kind == INT:
            encoding = next(self._tail(number, ct.c_uint32, 1)) >> 24  # type: ignore[operator, arg-type]
            if entry.size == 1:
                return f"{'char' if self._name(entry.name_off) == 'char' else 'u8'} {name}"
            return f"{'s' if encoding & 1 else 'u'}{entry.size * 8} {name}"
        if entry.kind in (ENUM, ENUM64):
            return f"u{entry.size * 8} {name}"
        if entry.kind == PTR:
            target = self._type(self._strip(entry.size)) if entry.size else None
            if target is not None and target.kind in (STRUCT, UNION, FWD) and target.name_off:
                keyword = "union" if target.kind == UNION else "struct"
                return f"{keyword} {self._name(target.name_off)} *{name}"
            return f"void *{name}"
        if entry.kind == ARRAY:
            array = next(self._tail(number, _Array, 1))
            return self._declare(array.type, f"{name}[{array.count}]", known)
        if entry.kind in (STRUCT, UNION) and self._name(entry.name_off) in known:
            return f"{'union' if entry.kind == UNION else 'struct'} {self._name(entry.name_off)} {name}"
        return f"u8 {name}[{size}]"

    def _struct(self, name: str, fields: Mapping[str, Field], known: Mapping[str, object]) -> str:
        """Each field is padded from the struct's start, so that arms of the kernel's own unions may overlap."""
        number = self.find(name, STRUCT, UNION)
        assert number is not None
        lines = [f"\t\tu8 __size[{self._type(number).size}];"]
        checks = []
        for field, place in fields.items():
            if place.bits:
                lines.append(f"\t\tstruct {{ u8 __before_{field}[{place.offset}]; u8 {field}_byte; }};")
                continue
            pad = f"u8 __before_{field}[{place.offset}]; " if place.offset else ""
            lines.append(f"\t\tstruct {{ {pad}{self._declare(place.type, field, known)}; }};")
            offset = f"__builtin_offsetof(struct {name}, {field})"
            checks.append(f'_Static_assert({offset} == {place.offset}, "{name}.{field}");')
        return "\n".join([f"struct {name} {{", "\tunion {", *lines, "\t};", "};", *checks, ""])

    def header(self, structs: Mapping[str, tuple[str, ...]], constants: Iterable[str]) -> Header:
        """C structs with the named fields, `HAVE_<struct>_<field>` for each that exists, enumerators as macros."""
        missing: set[str] = set()
        found: dict[str, dict[str, Field]] = {}
        for struct, fields in structs.items():
            for wish in fields:
                field = self.field(struct, wish.rstrip("?"))
                if field:
                    found.setdefault(struct, {})[wish.rstrip("?")] = field
                elif not wish.endswith("?"):
                    missing.add(f"{struct}.{wish}")
        macros = [f"#define HAVE_{s}_{f} 1" for s, fields in found.items() for f in fields]
        for constant in constants:
            enums, _, name = constant.rstrip("?").partition(".")
            values = (self.enumerator(enum, name) for enum in enums.split("|"))
            value = next((value for value in values if value is not None), None)
            if value is not None:
                macros.append(f"#define {name} {value}")
            elif not constant.endswith("?"):
                missing.add(constant)
        bodies = [self._struct(name, found[name], found) for name in self._in_order(found)]
        return Header("\n".join([*macros, *bodies]), frozenset(missing))

    def _in_order(self, found: Mapping[str, Mapping[str, Field]]) -> list[str]:
        """Structs that are embedded in others come first, as C wants it."""
        order: list[str] = []

        def visit(name: str) -> None:
            if name in order:
                return
            for field in found[name].values():
                number = self._strip(field.type)
                entry = self._type(number)
                while entry.kind == ARRAY:
                    number = self._strip(next(self._tail(number, _Array, 1)).type)
                    entry = self._type(number)
                inner = self._name(entry.name_off)
                if entry.kind in (STRUCT, UNION) and inner in found:
                    visit(inner)
            order.append(name)

        for name in found:
            visit(name)
        return order
