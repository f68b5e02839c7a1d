# SPDX-License-Identifier: Apache-2.0
"""What a collector declares about itself. Pure data: nothing here touches the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from daemon.model import Family, Metric

NET_NAMESPACE = "/proc/self/ns/net"
HookKind = Literal["tp_btf", "raw_tp", "fentry", "fexit", "kprobe", "kretprobe", "iter"]
Fidelity = Literal["exact", "approximate"]


@dataclass(frozen=True, slots=True)
class Option:
    """One configuration key of a collector.

    kind `choice` takes one of `choices`; `int` a whole number from `minimum` to `maximum`; `bool` true or
    false; `ports` a list of at most `maximum` distinct TCP ports (1 to 65535).
    """

    name: str
    kind: Literal["choice", "int", "bool", "ports"]
    default: str | int | bool | tuple[int, ...]
    help: str
    choices: tuple[str, ...] = ()
    minimum: int = 0
    maximum: int = 0


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a program attaches: `Hook("tp_btf", "sched_switch")`."""

    kind: HookKind
    target: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}"


AGAIN = "_again"


def twice(kind: HookKind, target: str) -> dict[str, Hook]:
    """A program that an interrupt can catch, and its second copy (bpf/include/twice.h)."""
    return {target: Hook(kind, target), f"{target}{AGAIN}": Hook(kind, target)}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to measure a part: C functions and where each attaches.

    `programs` names C functions and where each attaches; `define` is set (`-D`) when the variant is chosen.
    `needs` are optional kernel fields (`struct.field`) that this variant cannot do without. `approximate` is
    empty where the count is exact, else the reason.
    """

    programs: Mapping[str, Hook]
    define: str = ""
    needs: tuple[str, ...] = ()
    approximate: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """Something a collector must hook, with its variants in the order of preference."""

    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a map, its per-CPU values already merged. Structs are dicts, arrays are lists."""

    key: Any
    value: Any


Tables = Mapping[str, Sequence[Row]]


@dataclass(frozen=True, slots=True)
class Context:
    """What `decode` may know beside the rows; functions so that tests pass literals.

    `cgroup_path` turns a cgroup v2 id into its path, or the empty string when it is gone. `wall_clock` turns
    boot-time nanoseconds (`bpf_ktime_get_boot_ns`) into seconds since the epoch. `created` is when counting
    began, in seconds since the epoch.
    """

    options: Mapping[str, Any]
    max_series: int
    created: float
    cgroup_path: Callable[[int], str]
    wall_clock: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What came of one reading; `dropped` series did not fit into `max_series` and were added to `other`."""

    families: Sequence[Family]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """The kernel's own account of what a collector counts.

    `files` hold it, as text (of a link: where it leads); `counted` gives our events and the kernel's since counting
    began, from the files' texts at that time and now, and from the rows of the tables, or None where these cannot be
    compared. Events that both cannot see are in neither.

    Where the kernel has counted less than `enough`, nothing is said but 1.0: what was under way when counting began is
    in its account alone, and does not show among many.

    An account of one network namespace (`/proc/net`) has NET_NAMESPACE among its files, and its program has a map
    `net_namespace` whose first word the loader sets to the inode number of its own.
    """

    files: tuple[str, ...]
    counted: Callable[[Mapping[str, str], Mapping[str, str], Tables], tuple[int, int] | None]
    enough: int = 10_000


@dataclass(frozen=True, slots=True)
class Event:
    """An event for the journal: a sentence for a person, and one field for each fact."""

    message_id: str
    priority: int
    message: str
    fields: Mapping[str, str | int]
    timestamp: float


@dataclass(frozen=True, slots=True)
class Collector:
    """A collector: one Python file, one program in `bpf/` of the same stem, one test file of the same stem.

    `structs` names the kernel structs and fields that the program reads; a field that ends in `?` may be
    missing, and `HAVE_<struct>_<field>` tells the program. `constants` are kernel enumerators (`enum.name`,
    `enum.name?`, `enum|older_enum.name`).
    `symbols` are kernel functions whose address and size the program uses, where `/proc/kallsyms` tells them.
    `defines` turns options into `-D` definitions; what is off is not compiled. `decode` is pure and gets the rows of
    `tables`. `truth` compares with the kernel's own account where there is one. `event` turns one ring buffer record
    into a journal entry.
    """

    name: str
    summary: str
    parts: tuple[Part, ...]
    structs: Mapping[str, tuple[str, ...]]
    options: tuple[Option, ...]
    metrics: Callable[[Mapping[str, Any]], tuple[Metric, ...]]
    defines: Callable[[Mapping[str, Any]], Mapping[str, int | str]]
    tables: tuple[str, ...]
    decode: Callable[[Tables, Context], Decoded]
    constants: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    truth: Truth | None = None
    event: Callable[[Any, Context], Event] | None = None
