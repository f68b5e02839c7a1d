# SPDX-License-Identifier: Apache-2.0
"""From a collector's declaration to attached programs: which variant this kernel gets, and why not another.

Features are probed, not inferred from a version: BTF tells which hooks and fields exist, and a program that the kernel
refuses moves its part on to the next variant.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from daemon import libbpf
from daemon.btf import Btf
from daemon.compiler import SOURCES
from daemon.declare import Collector, Hook, Part, Variant
from daemon.errors import UnsupportedError
from daemon.libbpf import VerifierError

DIRECT = frozenset({"tp_btf", "fentry", "fexit", "iter"})
_TRACEPOINTS = frozenset({"tp_btf", "raw_tp"})
_ATTACH_TYPES = {
    "tp_btf": libbpf.ATTACH_TRACE_RAW_TP, "fentry": libbpf.ATTACH_TRACE_FENTRY,
    "fexit": libbpf.ATTACH_TRACE_FEXIT, "iter": libbpf.ATTACH_TRACE_ITER,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """One variant for each part, the C text and flags that follow, and what was passed over (`part: reason`)."""

    variants: Mapping[str, Variant]
    refused: Mapping[str, str]
    text: str
    flags: tuple[str, ...]

    @property
    def programs(self) -> dict[str, tuple[Hook, str]]:
        """C function to hook and the reason why its count is approximate."""
        return {
            name: (hook, variant.approximate)
            for variant in self.variants.values()
            for name, hook in variant.programs.items()
        }


class Refused(Exception):
    """The kernel does not take this program here."""

    def __init__(self, program: str, reason: str) -> None:
        super().__init__(reason)
        self.program = program
        self.reason = reason


@dataclass(slots=True)
class Planner:
    """Chooses variants; `forbidden` hook kinds count as refused (a way to try the others)."""

    collector: Collector
    defines: Mapping[str, int | str]
    btf: Btf
    forbidden: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    _refusals: set[tuple[str, int]] = field(default_factory=set)

    def plan(self) -> Plan:
        header = self.btf.header(self.collector.structs, self.collector.constants)
        if header.missing:
            raise UnsupportedError(
                f"{self.collector.name}: this kernel has no {', '.join(sorted(header.missing))}; "
                "it needs a program written for this kernel"
            )
        chosen = {part.name: self._choose(part) for part in self.collector.parts}
        hooks = {name: hook for variant in chosen.values() for name, hook in variant.programs.items()}
        macros: dict[str, int | str] = dict(self.defines) | {
            variant.define: 1 for variant in chosen.values() if variant.define
        }
        macros |= {f"HOOK_{name}_{hook.kind}": 1 for name, hook in hooks.items()}
        for name, (address, size) in symbols(self.collector.symbols).items():
            macros |= {f"SYMBOL_{name}": f"{address:#x}ULL", f"SYMBOL_{name}_SIZE": f"{size}ULL"}
        for hook in hooks.values():
            if hook.kind in _TRACEPOINTS:
                macros[f"ARGS_{hook.target}"] = self.btf.tracepoint_arguments(hook.target) or 0
        if all(hook.kind in DIRECT for hook in hooks.values()):
            macros["DIRECT_READS"] = 1
        source = _with_includes(SOURCES / f"{self.collector.name}.bpf.c")
        flags = tuple(f"-D{name}={value}" for name, value in sorted(macros.items()))
        return Plan(chosen, dict(self.refused), f"{header.text}\n{source}", flags)

    def refuse(self, program: str, reason: str) -> None:
        """Strikes the variant that this program belongs to."""
        for part in self.collector.parts:
            chosen = self._first(part)
            if chosen is not None and program in part.variants[chosen].programs:
                self._refusals.add((part.name, chosen))
                self.refused[f"{part.name} {part.variants[chosen].programs[program]}"] = reason
                return

    def _first(self, part: Part) -> int | None:
        for index in range(len(part.variants)):
            if (part.name, index) not in self._refusals:
                return index
        return None

    def _choose(self, part: Part) -> Variant:
        while (index := self._first(part)) is not None:
            variant = part.variants[index]
            reason = self._lacks(variant)
            if not reason:
                return variant
            self._refusals.add((part.name, index))
            hooks = ", ".join(str(hook) for hook in variant.programs.values()) or "nothing"
            self.refused[f"{part.name} {hooks}"] = reason
        reasons = "; ".join(f"{what}: {why}" for what, why in self.refused.items())
        raise UnsupportedError(f"{self.collector.name}: this kernel allows no hook for {part.name} ({reasons})")

    def _lacks(self, variant: Variant) -> str:
        """Why BTF rules a variant out; empty when it does not."""
        for need in variant.needs:
            struct, _, name = need.partition(".")
            if self.btf.field(struct, name) is None:
                return f"this kernel has no {need}"
        for hook in variant.programs.values():
            if hook.kind in self.forbidden:
                return "forbidden by BPFMETRICSD_FORBID"
            if hook.kind in _TRACEPOINTS and self.btf.tracepoint_arguments(hook.target) is None:
                return f"this kernel has no tracepoint {hook.target}"
            function = f"bpf_iter_{hook.target}" if hook.kind == "iter" else hook.target
            if hook.kind not in _TRACEPOINTS and self.btf.function_arguments(function) is None:
                return f"this kernel has no function {function}"
            if hook.kind in ("kprobe", "kretprobe") and not _KPROBE.exists():
                return "this kernel has no kprobes"
        return ""


def symbols(names: tuple[str, ...], source: Path = Path("/proc/kallsyms")) -> dict[str, tuple[int, int]]:
    """Address and size of kernel functions; those that the kernel hides or does not have are left out."""
    if not names:
        return {}
    addresses, found = [], {}
    with source.open() as lines:
        for line in lines:
            address, kind, name = line.split()[:3]
            if kind in "tT":
                addresses.append(int(address, 16))
                if name in names:
                    found[name] = addresses[-1]
    return {
        name: (start, min((one for one in addresses if one > start), default=start) - start)
        for name, start in found.items()
        if start
    }


def _with_includes(path: Path) -> str:
    """The source with the project's own headers in place: bcc rewrites map calls in the main text only."""
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = re.match(r'#include "(\w+\.h)"', line)
        if match:
            lines += [_with_includes(SOURCES / "include" / match.group(1)), f'#line {number + 1} "{path.name}"']
        else:
            lines.append(line)
    return "\n".join(lines)


def load(name: str, hook: Hook, instructions: bytes) -> int:
    """Loads a program for its hook. Raises `Refused`."""
    try:
        if hook.kind in _ATTACH_TYPES:
            attach_type = _ATTACH_TYPES[hook.kind]
            number = libbpf.vmlinux_btf_id(hook.target, attach_type)
            return libbpf.prog_load(name, libbpf.PROG_TYPE_TRACING, instructions, attach_type, number)
        kind = libbpf.PROG_TYPE_RAW_TRACEPOINT if hook.kind == "raw_tp" else libbpf.PROG_TYPE_KPROBE
        return libbpf.prog_load(name, kind, instructions)
    except VerifierError as error:
        last = [line for line in error.log.splitlines() if line and not line.startswith("processed")][-1:]
        detail = f": {last[0]}" if last else ""
        raise Refused(name, f"{os.strerror(error.errno or 0)}{detail}") from error
    except OSError as error:
        raise Refused(name, os.strerror(error.errno or 0)) from error


def attach(name: str, hook: Hook, program: int) -> int:
    """A link that holds a program at its hook until the link's last descriptor and pin are gone. Raises `Refused`."""
    try:
        if hook.kind == "raw_tp":
            return libbpf.raw_tracepoint_open(hook.target, program)
        if hook.kind == "iter":
            return libbpf.link_create(program, 0, libbpf.ATTACH_TRACE_ITER)
        if hook.kind in ("kprobe", "kretprobe"):
            return _attach_kprobe(hook, program)
        return libbpf.raw_tracepoint_open(None, program)
    except PermissionError as error:
        raise Refused(name, f"{os.strerror(error.errno or 0)}{_paranoia(hook)}") from error
    except OSError as error:
        raise Refused(name, os.strerror(error.errno or 0)) from error


_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def _paranoia(hook: Hook, setting: Path = _PARANOID) -> str:
    """Debian's kernels know a level 3, which mainline does not: CAP_PERFMON does not open perf events there."""
    if hook.kind in ("kprobe", "kretprobe") and int(setting.read_text()) > 2:
        return "; kernel.perf_event_paranoid=3 leaves kprobes to CAP_SYS_ADMIN, set it to 2"
    return ""


_KPROBE = Path("/sys/bus/event_source/devices/kprobe")
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}


class _PerfEventAttr(ctypes.Structure):
    """struct perf_event_attr, version 1 (PERF_ATTR_SIZE_VER1): what a kprobe needs of it."""

    _fields_ = (
        ("type", ctypes.c_uint32), ("size", ctypes.c_uint32), ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64), ("sample_type", ctypes.c_uint64), ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64), ("wakeup_events", ctypes.c_uint32), ("bp_type", ctypes.c_uint32),
        ("kprobe_func", ctypes.c_uint64), ("probe_offset", ctypes.c_uint64),
    )  # fmt: skip


def _attach_kprobe(hook: Hook, program: int) -> int:
    """A kprobe of its own (perf_event_open), held by a BPF link, which can be pinned from kernel 5.15 on."""
    target = ctypes.create_string_buffer(hook.target.encode())
    retprobe = int((_KPROBE / "format" / "retprobe").read_text().split(":")[1]) if hook.kind == "kretprobe" else None
    attributes = _PerfEventAttr(
        type=int((_KPROBE / "type").read_text()), size=ctypes.sizeof(_PerfEventAttr),
        config=0 if retprobe is None else 1 << retprobe, kprobe_func=ctypes.addressof(target),
    )  # fmt: skip
    libc = ctypes.CDLL(None, use_errno=True)
    event = libc.syscall(_PERF_EVENT_OPEN[platform.machine()], ctypes.byref(attributes), -1, 0, -1, 8)  # FD_CLOEXEC
    if event < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        return libbpf.link_create(program, event, libbpf.ATTACH_PERF_EVENT)
    finally:
        os.close(event)  # the link holds the event


def replace_maps(compiled: Mapping[str, int], existing: Mapping[str, int]) -> None:
    """Lets bytecode that names maps by descriptor number use other maps: the numbers now mean the existing ones."""
    for name, descriptor in existing.items():
        os.dup2(descriptor, compiled[name], inheritable=False)


def load_all(plan: Plan, functions: Mapping[str, bytes]) -> dict[str, int]:
    """Loads each program of a plan; on the first no closes those already loaded. Raises `Refused`."""
    return _each(plan, lambda name, hook: load(name, hook, functions[name]))


def attach_all(plan: Plan, programs: Mapping[str, int]) -> dict[str, int]:
    """Attaches each program of a plan, iterators apart, which run once. Raises `Refused`."""
    return _each(plan, lambda name, hook: attach(name, hook, programs[name]))


def _each(plan: Plan, do: Callable[[str, Hook], int]) -> dict[str, int]:
    done: dict[str, int] = {}
    try:
        for name, (hook, _) in plan.programs.items():
            done[name] = do(name, hook)
    except Refused:
        for descriptor in done.values():
            os.close(descriptor)
        raise
    return done
