# SPDX-License-Identifier: Apache-2.0
"""Which variant a kernel gets, by what it has. Nothing here touches a kernel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import collectors
from daemon import attach, libbpf
from daemon.attach import Plan, Planner, Refused, load_all, replace_maps, symbols
from daemon.btf import Btf, Field, Header
from daemon.declare import Collector, Hook, HookKind, Part, Variant
from daemon.errors import UnsupportedError
from daemon.libbpf import VerifierError


class Kernel(Btf):
    """What a kernel has: tracepoints and functions with their number of arguments, fields as `struct.field`."""

    def __init__(
        self, tracepoints: Mapping[str, int] | None = None, functions: Mapping[str, int] | None = None,
        fields: Iterable[str] = (), missing: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.tracepoints = tracepoints or {}
        self.functions = functions or {}
        self.fields = frozenset(fields)
        self.missing = frozenset(missing)

    def tracepoint_arguments(self, name: str) -> int | None:
        return self.tracepoints.get(name)

    def function_arguments(self, name: str) -> int | None:
        return self.functions.get(name)

    def field(self, struct: str, name: str) -> Field | None:
        return Field(0, 1) if f"{struct}.{name}" in self.fields else None

    def header(self, *_: object) -> Header:
        return Header("struct task_struct { int pid; };", self.missing)


def one(kind: HookKind, target: str, program: str = "", **more: Any) -> Variant:
    return Variant({program or target: Hook(kind, target)}, **more)


def collector(*parts: Part, symbols: tuple[str, ...] = ()) -> Collector:
    """A collector with these parts, on the program of an existing one."""
    return Collector(
        name="cachestat", summary="", parts=parts, structs={}, options=(), metrics=lambda options: (),
        defines=lambda options: {}, tables=(), decode=lambda tables, context: pytest.fail("not here"), symbols=symbols,
    )  # fmt: skip


READS = Part(
    "reads",
    (
        one("tp_btf", "get_pages", define="TRACEPOINT"),
        one("fexit", "do_read", define="FUNCTION", needs=("file.position",), approximate="without sendfile"),
        one("raw_tp", "get_pages"),
        one("kprobe", "do_read", program="read_entry"),
    ),
)
WRITES = Part("writes", (one("tp_btf", "dirty"), one("raw_tp", "dirty")))
EVERYTHING = Kernel({"get_pages": 3, "dirty": 2}, {"do_read": 3}, {"file.position"})


@pytest.fixture(autouse=True)
def kprobes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels here have kprobes, unless a test takes them away."""
    monkeypatch.setattr(attach, "_KPROBE", tmp_path)


def hooks(plan: Plan) -> list[str]:
    return [str(hook) for hook, _ in plan.programs.values()]


def planned(kernel: Kernel, *forbidden: str, parts: tuple[Part, ...] = (READS,)) -> Plan:
    return Planner(collector(*parts), {}, kernel, frozenset(forbidden)).plan()


def test_first_variant_wins() -> None:
    plan = planned(EVERYTHING, parts=(READS, WRITES))
    assert hooks(plan) == ["tp_btf:get_pages", "tp_btf:dirty"]
    assert plan.refused == {}


@pytest.mark.parametrize(
    ("kernel", "expected", "passed_over"),
    [
        (Kernel({}, {"do_read": 3}, {"file.position"}), "fexit:do_read",
         {"reads tp_btf:get_pages": "this kernel has no tracepoint get_pages"}),
        (Kernel({}, {"do_read": 3}), "kprobe:do_read",
         {"reads tp_btf:get_pages": "this kernel has no tracepoint get_pages",
          "reads fexit:do_read": "this kernel has no file.position",
          "reads raw_tp:get_pages": "this kernel has no tracepoint get_pages"}),
    ],
)  # fmt: skip
def test_what_a_kernel_lacks_moves_a_part_on(kernel: Kernel, expected: str, passed_over: dict[str, str]) -> None:
    plan = planned(kernel)
    assert hooks(plan) == [expected]
    assert plan.refused == passed_over


@pytest.mark.parametrize(
    ("forbidden", "expected"),
    [
        (("tp_btf",), "fexit:do_read"),
        (("tp_btf", "fexit"), "raw_tp:get_pages"),
        (("tp_btf", "fexit", "raw_tp"), "kprobe:do_read"),
    ],
)
def test_forbidden_kinds(forbidden: tuple[str, ...], expected: str) -> None:
    plan = planned(EVERYTHING, *forbidden)
    assert hooks(plan) == [expected]
    assert set(plan.refused.values()) == {"forbidden by BPFMETRICSD_FORBID"}


def test_no_variant_is_left() -> None:
    with pytest.raises(UnsupportedError) as caught:
        planned(EVERYTHING, "tp_btf", "fexit", "raw_tp", "kprobe")
    message = str(caught.value)
    assert message.startswith("cachestat: this kernel allows no hook for reads (")
    assert all(f"reads {kind}:" in message for kind in ("tp_btf", "fexit", "raw_tp", "kprobe"))


def test_no_kprobes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attach, "_KPROBE", tmp_path / "absent")
    with pytest.raises(UnsupportedError, match="this kernel has no kprobes"):
        planned(Kernel({}, {"do_read": 3}))


def test_missing_types_stop_the_collector() -> None:
    with pytest.raises(UnsupportedError, match=r"^cachestat: this kernel has no a\.b, c\.d; ") as caught:
        planned(Kernel(missing={"c.d", "a.b"}))
    assert caught.value.status == 3


def test_one_missing_hook_rules_a_whole_variant_out() -> None:
    both = Variant({"get_pages": Hook("tp_btf", "get_pages"), "fault": Hook("tp_btf", "fault")})
    plan = planned(EVERYTHING, parts=(Part("accesses", (both, one("raw_tp", "get_pages"))),))
    assert hooks(plan) == ["raw_tp:get_pages"]
    assert plan.refused == {
        "accesses tp_btf:get_pages, tp_btf:fault": "this kernel has no tracepoint fault"
    }  # fmt: skip


def test_an_iterator_is_a_function_of_the_kernel() -> None:
    part = Part("seed", (one("iter", "tcp"), Variant({}, approximate="older connections are not seen")))
    assert hooks(planned(Kernel({}, {"bpf_iter_tcp": 3}), parts=(part,))) == ["iter:tcp"]
    plan = planned(Kernel({}, {"tcp": 3}), parts=(part,))
    assert hooks(plan) == []
    assert plan.refused == {"seed iter:tcp": "this kernel has no function bpf_iter_tcp"}
    assert plan.variants["seed"].approximate == "older connections are not seen"


def test_refusals_of_the_kernel() -> None:
    """A program that does not load strikes its variant, and only the part that it belongs to."""
    planner = Planner(collector(READS, WRITES), {}, EVERYTHING)
    assert hooks(planner.plan()) == ["tp_btf:get_pages", "tp_btf:dirty"]
    planner.refuse("get_pages", "Operation not permitted")
    assert hooks(planner.plan()) == ["fexit:do_read", "tp_btf:dirty"]
    planner.refuse("do_read", "Invalid argument")
    planner.refuse("dirty", "Invalid argument")
    plan = planner.plan()
    assert hooks(plan) == ["raw_tp:get_pages", "raw_tp:dirty"]
    assert plan.refused == {
        "reads tp_btf:get_pages": "Operation not permitted",
        "reads fexit:do_read": "Invalid argument",
        "writes tp_btf:dirty": "Invalid argument",
    }


def test_a_program_that_is_in_no_chosen_variant_strikes_nothing() -> None:
    planner = Planner(collector(READS), {}, EVERYTHING)
    planner.plan()
    planner.refuse("read_entry", "Invalid argument")
    assert planner.refused == {}
    assert hooks(planner.plan()) == ["tp_btf:get_pages"]


def test_flags() -> None:
    planner = Planner(collector(READS, WRITES), {"MAX": 5, "CASES": "case 1: break;"}, EVERYTHING)
    assert planner.plan().flags == (
        "-DARGS_dirty=2", "-DARGS_get_pages=3", "-DCASES=case 1: break;", "-DDIRECT_READS=1", "-DHOOK_dirty_tp_btf=1",
        "-DHOOK_get_pages_tp_btf=1", "-DMAX=5", "-DTRACEPOINT=1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("forbidden", "direct"), [((), True), (("tp_btf",), False), (("raw_tp",), True), (("tp_btf", "raw_tp"), True)]
)
def test_direct_reads_only_when_all_programs_may(forbidden: tuple[str, ...], direct: bool) -> None:
    writes = Part("writes", (*WRITES.variants, one("fentry", "do_write")))
    kernel = Kernel(EVERYTHING.tracepoints, {"do_read": 3, "do_write": 2}, EVERYTHING.fields)
    plan = planned(kernel, *forbidden, parts=(READS, writes))
    assert ("-DDIRECT_READS=1" in plan.flags) == direct


def test_approximate_variants_say_so() -> None:
    plan = planned(EVERYTHING, "tp_btf")
    assert plan.programs == {"do_read": (Hook("fexit", "do_read"), "without sendfile")}


def test_text_is_types_then_source_with_our_headers_in_place() -> None:
    text = planned(EVERYTHING).text
    assert text.startswith('struct task_struct { int pid; };\n#line 1 "cachestat.bpf.c"\n')
    assert "#include" not in text
    assert '#line 1 "program.h"' in text
    assert "BPF_ARRAY(control, u64, 1);" in text
    assert text.count("#define BPFMETRICSD_PROGRAM_H") == 1


@pytest.mark.parametrize("name", [one.name for one in collectors.ALL])
def test_every_line_of_a_source_keeps_its_number(name: str) -> None:
    """clang's errors name the file and the line that an author sees."""
    source = attach.SOURCES / f"{name}.bpf.c"
    wanted = dict(enumerate(source.read_text().splitlines(), 1))
    current, number = "", 0
    seen: dict[int, str] = {}
    for line in attach._with_includes(source).splitlines():
        if line.startswith("#line "):
            _, told, current = line.split()
            number = int(told)
            continue
        if current == f'"{source.name}"':
            seen[number] = line
        number += 1
    assert seen == {at: line for at, line in wanted.items() if not line.startswith('#include "')}


# symbols

KALLSYMS = """\
ffffffff81000000 T _text
ffffffff81000100 t __pfx_mem_cgroup_out_of_memory
ffffffff81000110 t mem_cgroup_out_of_memory
ffffffff81000400 T out_of_memory
ffffffff81000410 d data_in_between
ffffffff81000900 W weak
ffffffff81000a00 t last_one
ffffffffc0000000 t of_a_module\t[ext4]
"""


def test_symbols(tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    wanted = ("mem_cgroup_out_of_memory", "out_of_memory", "absent", "data_in_between", "of_a_module")
    found = symbols(wanted, tmp_path / "kallsyms")
    assert found == {
        "mem_cgroup_out_of_memory": (0xFFFFFFFF81000110, 0x2F0),
        "out_of_memory": (0xFFFFFFFF81000400, 0x600),
        "of_a_module": (0xFFFFFFFFC0000000, 0),
    }


def test_symbols_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text("\n".join(reversed(KALLSYMS.splitlines())) + "\n")
    assert symbols(("out_of_memory",), tmp_path / "kallsyms") == {"out_of_memory": (0xFFFFFFFF81000400, 0x600)}


def test_symbols_that_the_kernel_hides(tmp_path: Path) -> None:
    """kernel.kptr_restrict shows every address as zero."""
    (tmp_path / "kallsyms").write_text(
        "0000000000000000 t mem_cgroup_out_of_memory\n0000000000000000 T out_of_memory\n"
    )
    assert symbols(("mem_cgroup_out_of_memory",), tmp_path / "kallsyms") == {}


def test_without_symbols_nothing_is_read(tmp_path: Path) -> None:
    assert symbols((), tmp_path / "absent") == {}


# load, attach


def test_reason_of_the_verifier_is_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "0: R1=ctx()\nR2 unbounded memory access\nprocessed 5 insns (limit 1000000)\n"

    def refuse(*_: object) -> int:
        raise VerifierError(22, "dirty", log)

    monkeypatch.setattr(libbpf, "prog_load", refuse)
    with pytest.raises(Refused) as caught:
        attach.load("dirty", Hook("raw_tp", "dirty"), b"")
    assert (caught.value.program, caught.value.reason) == (
        "dirty", f"{os.strerror(22)}: R2 unbounded memory access",
    )  # fmt: skip


def test_what_was_loaded_is_closed_when_the_next_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []

    def load_first(name: str, *_: object) -> int:
        if name == "dirty":
            raise OSError(1, "no")
        ends.extend(os.pipe())
        return ends[0]

    monkeypatch.setattr(libbpf, "prog_load", load_first)
    plan = planned(EVERYTHING, "tp_btf", "fexit", parts=(READS, WRITES))
    with pytest.raises(Refused, match="Operation not permitted"):
        load_all(plan, {"get_pages": b"", "dirty": b""})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[0])
    os.close(ends[1])


def test_map_numbers_come_to_mean_the_existing_maps() -> None:
    compiled, existing = os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)
    try:
        replace_maps({"pages": compiled}, {"pages": existing})
        assert os.fstat(compiled).st_rdev == os.fstat(existing).st_rdev
        assert not os.get_inheritable(compiled)
    finally:
        os.close(compiled)
        os.close(existing)


def test_kprobe_attributes_have_the_size_that_the_kernel_knows() -> None:
    assert ctypes.sizeof(attach._PerfEventAttr) == 72  # PERF_ATTR_SIZE_VER1


def test_a_paranoid_kernel_is_named(tmp_path: Path) -> None:
    setting = tmp_path / "perf_event_paranoid"
    setting.write_text("2\n")
    assert attach._paranoia(Hook("kprobe", "do_read"), setting) == ""
    setting.write_text("3\n")
    assert "set it to 2" in attach._paranoia(Hook("kretprobe", "do_read"), setting)
    assert attach._paranoia(Hook("fexit", "do_read"), setting) == ""
