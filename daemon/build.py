# SPDX-License-Identifier: Apache-2.0
"""Builds one collector in a child process of its own: plan, compile, load, attach, pin, hand over.

A compiler crash or a verifier's no then stops one collector and not the rest, and LLVM's memory goes with the child.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from daemon import __version__, attach, coverage, layout, libbpf, pins
from daemon.attach import Plan, Planner, Refused
from daemon.btf import Btf
from daemon.compiler import Compiled, compile_text, first_error
from daemon.declare import NET_NAMESPACE, Collector
from daemon.errors import BpfmetricsdError
from daemon.manifest import Manifest, MapShape, ProgramInfo
from daemon.pins import CONTROL, Descriptors

TIMEOUT_S = 300  # a compile takes 0.2 s, and 60 s on an emulated machine
LAYOUT_ONLY = "_layout"  # maps of this suffix exist only so that bcc describes a ring buffer's record


@dataclass(frozen=True, slots=True)
class Request:
    """What to build. `known` is what is loaded and sound now, if anything; its maps are kept when the layout agrees."""

    collector: Collector
    options: Mapping[str, Any]
    defines: Mapping[str, int | str]
    bpffs: Path
    group: int
    forbidden: frozenset[str]
    bcc: str
    known: Manifest | None
    program_hash: str


def run(requests: Sequence[Request]) -> Iterator[tuple[Request, Manifest | str]]:
    """Builds all, as many at once as there are CPUs; the manifest or the reason of the failure, as each ends."""
    waiting = list(requests)
    running: dict[Connection, tuple[Request, Any, IO[bytes], float]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            request = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            words: IO[bytes] = tempfile.TemporaryFile()
            child = context.Process(
                target=_child, args=(request, theirs, words), name=f"build {request.collector.name}"
            )
            child.start()
            theirs.close()
            running[ours] = (request, child, words, time.monotonic() + TIMEOUT_S)
        ready = wait(list(running), timeout=1)
        for ours, (request, child, words, deadline) in list(running.items()):
            if ours in ready:
                result = _result(ours, child, words)
            elif time.monotonic() > deadline:
                child.kill()
                result = f"did not build within {TIMEOUT_S} s; try again on a quieter machine"
            else:
                continue
            child.join()
            ours.close()
            words.close()
            del running[ours]
            yield request, result


def _result(pipe: Connection, child: Any, words: IO[bytes]) -> Manifest | str:
    """What the child sent, with what clang said; a compiler that crashed sent nothing."""
    try:
        answer = pipe.recv()
    except EOFError:
        child.join()
        answer = f"the compiler ended with status {child.exitcode}"
    if isinstance(answer, Manifest):
        return answer
    words.seek(0)
    said = first_error(words.read().decode(errors="replace"))
    return f"{answer}: {said}" if said else str(answer)


def _child(request: Request, pipe: Connection, words: IO[bytes]) -> None:
    os.dup2(words.fileno(), 2)  # clang writes there, whatever Python thinks of stderr
    try:
        pipe.send(build(request))
    except BpfmetricsdError as error:
        pipe.send(str(error).removeprefix(f"{request.collector.name}: "))
    except Exception as error:
        pipe.send(f"failed to build ({error!r})")


def build(request: Request) -> Manifest:
    """All of it, in this process. On failure nothing stays behind but the staging folder, which the caller sweeps."""
    planner = Planner(request.collector, request.defines, Btf(), request.forbidden)
    generation = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    while True:
        plan = planner.plan()
        compiled = compile_text(plan.text, [*plan.flags, f"-DGENERATION={generation}ULL"])
        shapes = _shapes(compiled)
        layout_hash = _hash(shapes)
        same = request.known is not None and request.known.layout_hash == layout_hash
        if same:
            _use_known_maps(request, compiled, shapes)
        try:
            programs = attach.load_all(plan, compiled.functions)
            links = attach.attach_all(plan, programs)
        except Refused as refused:
            planner.refuse(refused.program, refused.reason)
            continue
        break
    maps = {name: compiled.maps[name].descriptor for name in shapes}
    if not same and pins.NET_NAMESPACE in maps:  # known maps keep theirs, which is the one of the known account
        inode = os.stat(NET_NAMESPACE).st_ino
        libbpf.map_update(maps[pins.NET_NAMESPACE], bytes(4), inode.to_bytes(8, "little"))
    started, truth = _hand_over(request, plan, Descriptors(maps, links, programs), generation)
    return Manifest(
        collector=request.collector.name,
        program_hash=request.program_hash,
        layout_hash=layout_hash,
        version=__version__,
        bcc=request.bcc,
        started=request.known.started if same and request.known else started,
        truth=request.known.truth if same and request.known else truth,
        generation=generation,
        options=request.options,
        programs={name: ProgramInfo(str(hook), why) for name, (hook, why) in plan.programs.items() if name in links},
        maps=shapes,
        refused=plan.refused,
        notes={part: one.approximate for part, one in plan.variants.items() if one.approximate and not one.programs},
    )


def _shapes(compiled: Compiled) -> dict[str, MapShape]:
    """The maps to pin. A `<ring>_layout` map gives its value's layout to the ring buffer and is not kept itself."""
    shapes = {}
    for name, one in compiled.maps.items():
        if name.endswith(LAYOUT_ONLY):
            continue
        info = libbpf.map_info(one.descriptor)
        record = compiled.maps.get(f"{name}{LAYOUT_ONLY}")
        shapes[name] = MapShape(*info.shape(), one.key, record.value if record else one.value)
        if not record and info.type in libbpf.ITERABLE and layout.size(one.value) != info.value_size:
            raise BpfmetricsdError(
                f"map {name}: a value has {info.value_size} bytes, but as bcc describes it {layout.size(one.value)}; "
                "use plain integers, char arrays, structs and arrays of one dimension"
            )
    return shapes


def _hash(shapes: Mapping[str, MapShape]) -> str:
    text = json.dumps(
        {name: [shape.type, shape.key_size, shape.value_size, shape.max_entries, shape.key, shape.value]
         for name, shape in shapes.items()}, sort_keys=True)  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


def _use_known_maps(request: Request, compiled: Compiled, shapes: Mapping[str, MapShape]) -> None:
    folder = request.bpffs / request.collector.name / pins.MAPS
    existing = {name: pins.open_map(folder / name, writable=True)[0] for name in shapes}
    attach.replace_maps({name: compiled.maps[name].descriptor for name in shapes}, existing)
    for descriptor in existing.values():
        os.close(descriptor)


def _hand_over(request: Request, plan: Plan, objects: Descriptors, generation: int) -> tuple[float, dict[str, str]]:
    """Pins the new, lets it count with one store, removes the old.

    Returns when counting began, and the kernel's own account of that moment. Iterators run once, now that the
    programs count, and are not kept.
    """
    name = request.collector.name
    iterators = []
    for program, (hook, _) in plan.programs.items():
        if hook.kind == "iter":
            iterators.append(objects.links.pop(program))
            objects.programs.pop(program)
    pins.pin(request.bpffs / f"{name}{pins.STAGING}", objects, request.group)
    started = time.time()
    libbpf.map_update(objects.maps[CONTROL], bytes(4), generation.to_bytes(8, "little"))
    truth = coverage.texts(request.collector)
    pins.swap(request.bpffs, name)
    for link in iterators:
        libbpf.iterate(link)
    return started, truth
