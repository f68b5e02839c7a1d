# SPDX-License-Identifier: Apache-2.0
"""Types of a small kernel that is made here, byte by byte, and of the running one."""

from __future__ import annotations

import ctypes as ct
import re
import struct
from collections.abc import Callable, Sequence
from typing import NoReturn

import pytest

import collectors
from daemon import btf
from daemon.btf import CONST, FUNC, FUNC_PROTO, FWD, PTR, STRUCT, TYPEDEF, UNION, VMLINUX, Btf, Field

Member = tuple[str, int, int] | tuple[str, int, int, int]  # name, type, bit offset, bits of a bit-field


class Assembler:
    """Puts BTF together (Documentation/bpf/btf.rst). Each method gives the new type's id."""

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._strings = b"\0"

    def _text(self, text: str) -> int:
        if not text:
            return 0
        self._strings += text.encode() + b"\0"
        return len(self._strings) - len(text) - 1

    def _add(self, name: str, kind: int, size: int, *tail: int, count: int = 0, flag: bool = False) -> int:
        info = flag << 31 | kind << 24 | count
        self._types.append(struct.pack(f"=III{len(tail)}I", self._text(name), info, size, *tail))
        return len(self._types)

    def integer(self, name: str, size: int, signed: bool = False) -> int:
        return self._add(name, btf.INT, size, signed << 24 | size * 8)

    def to(self, kind: int, target: int, name: str = "") -> int:
        """A pointer, const, typedef, or a declaration of a struct elsewhere."""
        return self._add(name, kind, target)

    def array(self, target: int, index: int, count: int) -> int:
        return self._add("", btf.ARRAY, 0, target, index, count)

    def struct(self, name: str, size: int, *members: Member, kind: int = STRUCT) -> int:
        fields = any(len(member) == 4 for member in members)
        tail: list[int] = []
        for member_name, target, offset, *bits in members:
            tail += [self._text(member_name), target, offset | (bits[0] << 24 if bits else 0)]
        return self._add(name, kind, size, *tail, count=len(members), flag=fields)

    def enum(self, name: str, **values: int) -> int:
        tail = [word for key, value in values.items() for word in (self._text(key), value & 0xFFFFFFFF)]
        return self._add(name, btf.ENUM, 4, *tail, count=len(values))

    def prototype(self, returns: int, *arguments: int) -> int:
        tail = [word for argument in arguments for word in (0, argument)]
        return self._add("", FUNC_PROTO, returns, *tail, count=len(arguments))

    def done(self) -> bytes:
        types = b"".join(self._types)
        head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(self._strings))
        return head + types + self._strings


def kernel() -> bytes:
    make = Assembler()
    u8, u16, u32 = (make.integer(name, size) for name, size in (("unsigned char", 1), ("u16", 2), ("unsigned int", 4)))
    u64, s64, char = make.integer("long unsigned int", 8), make.integer("long int", 8, True), make.integer("char", 1)
    seconds = make.to(TYPEDEF, s64, "time64_t")
    comm = make.array(char, u32, 16)
    make.struct("inner", 16, ("first", u64, 0), ("second", make.to(CONST, seconds), 64))
    inner = 10  # the id that this struct got
    elsewhere = make.to(FWD, 0, "elsewhere")
    pointers = [make.to(PTR, target) for target in (inner, elsewhere, 0, u64)]
    state = make.enum("state", IDLE=0, BUSY=7, GONE=-1)
    arms = make.struct("", 8, ("as_number", u64, 0), ("as_pointer", pointers[0], 0), kind=UNION)
    middle = make.struct("", 16, ("low", u32, 0), ("", arms, 64))
    make.struct(
        "outer", 120, ("flag", u8, 0), ("comm", comm, 8), ("", middle, 192), ("inner", inner, 320),
        ("pairs", make.array(inner, u32, 2), 448), ("state", state, 704), ("near", pointers[0], 768),
        ("far", pointers[1], 832), ("any", pointers[2], 896),
    )  # fmt: skip
    make.struct("bits", 8, ("two", u32, 0, 2), ("six", u32, 2, 6), ("across", u32, 6, 4), ("whole", u16, 32, 0))
    make.struct("handle", 8, ("to_word", pointers[3], 0))
    trace = make.to(PTR, make.prototype(0, pointers[2], pointers[0], u32))
    make.to(TYPEDEF, trace, "btf_trace_wakeup")
    make.to(TYPEDEF, make.to(CONST, trace), "btf_trace_sleep")
    make._add("do_read", FUNC, make.prototype(s64, pointers[0], u64, u64), count=1)
    return make.done()


class Made(Btf):
    def __init__(self, raw: bytes) -> None:
        library = btf._lib
        library.btf__new.restype = ct.c_void_p
        library.btf__new.argtypes = [ct.c_char_p, ct.c_uint32]
        self._raw = raw
        self._btf = library.btf__new(raw, len(raw))
        assert self._btf


@pytest.fixture(scope="module")
def made() -> Btf:
    return Made(kernel())


@pytest.fixture(scope="module")
def running(lacks: Callable[[str], NoReturn]) -> Btf:
    if not VMLINUX.exists():
        lacks(f"{VMLINUX} does not exist; use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    return Btf()


def places(types: Btf, name: str, fields: Sequence[str]) -> dict[str, int | None]:
    return {one: place.offset if (place := types.field(name, one)) else None for one in fields}


def test_fields_lie_where_the_types_say(made: Btf) -> None:
    assert places(made, "outer", ("flag", "comm", "inner", "pairs", "state", "any")) == {
        "flag": 0, "comm": 1, "inner": 40, "pairs": 56, "state": 88, "any": 112,
    }  # fmt: skip


def test_fields_in_anonymous_structs_and_unions(made: Btf) -> None:
    found = places(made, "outer", ("low", "as_number", "as_pointer"))
    assert found == {"low": 24, "as_number": 32, "as_pointer": 32}


def test_what_is_not_there(made: Btf) -> None:
    assert made.field("outer", "first") is None, "a field of a struct that has a name of its own"
    assert made.field("outer", "nothing") is None
    assert made.field("nobody", "flag") is None
    assert made.find("elsewhere", STRUCT) is None


def test_bit_fields_are_the_byte_that_holds_them(made: Btf) -> None:
    two, six, whole = (made.field("bits", name) for name in ("two", "six", "whole"))
    assert two == Field(0, two.type, bits=True)
    assert six == Field(0, six.type, bits=True)
    assert made.field("bits", "across") is None, "bits of two bytes"
    assert whole == Field(4, whole.type)


def test_arguments_of_tracepoints_and_functions(made: Btf) -> None:
    """A tracepoint's prototype begins with a void pointer that programs do not see."""
    assert made.tracepoint_arguments("wakeup") == 2
    assert made.tracepoint_arguments("sleep") == 2
    assert made.tracepoint_arguments("nothing") is None
    assert made.function_arguments("do_read") == 3
    assert made.function_arguments("do_write") is None


def test_enumerators(made: Btf) -> None:
    assert [made.enumerator("state", name) for name in ("IDLE", "BUSY", "GONE")] == [0, 7, -1]
    assert made.enumerator("state", "LOST") is None
    assert made.enumerator("nothing", "IDLE") is None


def test_header_is_c(made: Btf) -> None:
    wishes = {"outer": ("flag", "comm", "as_pointer", "inner", "pairs", "state", "far", "any"), "inner": ("second",)}
    header = made.header(wishes, ("state.BUSY",))
    assert header.missing == frozenset()
    macros, bodies = header.text.split("struct inner {\n", 1)
    assert macros.splitlines() == [
        *(f"#define HAVE_outer_{name} 1" for name in wishes["outer"]), "#define HAVE_inner_second 1", "#define BUSY 7",
    ]  # fmt: skip
    inner, outer = bodies.split("struct outer {\n", 1)  # what is embedded comes first
    assert "\t\tstruct { u8 __before_second[8]; s64 second; };\n" in inner
    assert outer.splitlines()[:10] == [
        "\tunion {",
        "\t\tu8 __size[120];",
        "\t\tstruct { u8 flag; };",
        "\t\tstruct { u8 __before_comm[1]; char comm[16]; };",
        "\t\tstruct { u8 __before_as_pointer[32]; struct inner *as_pointer; };",
        "\t\tstruct { u8 __before_inner[40]; struct inner inner; };",
        "\t\tstruct { u8 __before_pairs[56]; struct inner pairs[2]; };",
        "\t\tstruct { u8 __before_state[88]; u32 state; };",
        "\t\tstruct { u8 __before_far[104]; struct elsewhere *far; };",
        "\t\tstruct { u8 __before_any[112]; void *any; };",
    ]
    assert '_Static_assert(__builtin_offsetof(struct outer, comm) == 1, "outer.comm");' in outer


def test_header_without_a_struct_that_others_embed(made: Btf) -> None:
    """It is so many bytes then, and pointers to pointers and to words point to anything."""
    text = made.header({"outer": ("inner",), "handle": ("to_word",), "bits": ("six",)}, ()).text
    assert "u8 inner[16];" in text
    assert "void *to_word;" in text
    assert "struct { u8 __before_six[0]; u8 six_byte; };" in text


def test_header_names_what_is_missing(made: Btf) -> None:
    wishes = {"outer": ("flag", "new?", "gone"), "nobody": ("x?",), "nothing": ("y",)}
    header = made.header(wishes, ("state.IDLE", "state.LOST", "state.MAYBE?"))
    assert header.missing == {"outer.gone", "nothing.y", "state.LOST"}
    assert re.findall(r"#define (\w+)", header.text) == ["HAVE_outer_flag", "IDLE"]
    assert "nobody" not in header.text


def test_kernel_without_btf_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        @staticmethod
        def btf__load_vmlinux_btf() -> None:
            return None

    monkeypatch.setattr(btf, "_lib", Nothing)
    with pytest.raises(btf.UnsupportedError, match="CONFIG_DEBUG_INFO_BTF=y"):
        Btf()


# The running kernel: what user space can know of it.


def test_running_kernel_has_what_every_collector_needs(running: Btf) -> None:
    missing = {one.name: set(running.header(one.structs, one.constants).missing) for one in collectors.ALL}
    assert missing == {one.name: set() for one in collectors.ALL}


def test_running_kernels_user_space_types(running: Btf) -> None:
    """struct iovec and struct timespec64 are as in user space on 64 bits; TASK_COMM_LEN is 16."""
    assert places(running, "iovec", ("iov_base", "iov_len")) == {"iov_base": 0, "iov_len": 8}
    assert places(running, "list_head", ("next", "prev")) == {"next": 0, "prev": 8}
    assert places(running, "sockaddr_in", ("sin_family", "sin_port", "sin_addr")) == {
        "sin_family": 0, "sin_port": 2, "sin_addr": 4,
    }  # fmt: skip
    assert "char comm[16];" in running.header({"task_struct": ("comm",)}, ()).text


def test_running_kernels_tracepoints(running: Btf) -> None:
    """Present in every kernel, and so are their arguments."""
    assert running.tracepoint_arguments("sys_enter") == 2  # (struct pt_regs *regs, long id)
    assert running.tracepoint_arguments("no_such_tracepoint") is None
    assert running.function_arguments("vfs_read") == 4
    assert running.enumerator("pid_type", "PIDTYPE_TGID") == 1
