# SPDX-License-Identifier: Apache-2.0
"""`load` and `unload`: idempotent, and the least that is right.

found                                  does
same program hash, pins alive          nothing, and never imports bcc
same layout, other program             attaches new programs to the same maps: counts go on
other layout                           new maps
half-written state, foreign pins       clears the collector's folder and loads anew, saying so
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import collectors
from daemon import __version__, build, compiler, manifest, pins
from daemon.build import Request
from daemon.config import CollectorConfig, Config
from daemon.declare import Collector
from daemon.errors import UnsupportedError
from daemon.manifest import DamagedManifest, Manifest

ARCHITECTURES = ("x86_64",)
BTF = Path("/sys/kernel/btf/vmlinux")
FORBID = "BPFMETRICSD_FORBID"
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `load` did for a collector: kept, loaded, replaced (same maps), unloaded or failed, and a sentence."""

    action: str
    detail: str


def preflight() -> None:
    """What makes loading impossible on this machine, before anything is touched. Raises `UnsupportedError`."""
    if platform.machine() not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {platform.machine()} is not supported; bpfmetricsd runs on {', '.join(ARCHITECTURES)}"
        )
    require_privileges()
    if not BTF.exists():
        raise UnsupportedError(f"{BTF} does not exist; use a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian's are)")
    compiler.version()


def require_privileges() -> None:
    """Loading and unloading need them. Raises `UnsupportedError`."""
    if not may_load(Path("/proc/self/status").read_text()):
        raise UnsupportedError("loading and unloading BPF programs needs root (or CAP_BPF and CAP_PERFMON); use sudo")


def may_load(status: str) -> bool:
    """Whether /proc/PID/status shows the capabilities that BPF programs of tracing types need."""
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    return bool(effective >> _CAP_SYS_ADMIN & 1 or (effective >> _CAP_BPF & 1 and effective >> _CAP_PERFMON & 1))


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """One loader at a time."""
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(state / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def program_hash(request: Request) -> str:
    """Of everything that decides the bytecode: source, declaration, options, compiler, kernel."""
    digest = hashlib.sha256()
    collector = request.collector
    sources = [compiler.SOURCES / f"{collector.name}.bpf.c", *sorted((compiler.SOURCES / "include").glob("*.h"))]
    for source in sources:
        digest.update(source.read_bytes())
    facts = (
        *(collector.parts, sorted(collector.structs.items()), collector.constants, collector.symbols),
        *(sorted(request.defines.items()), sorted(request.forbidden)),
        *(request.bcc, os.uname().release, os.uname().version, __version__),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def defines(collector: Collector, config: CollectorConfig) -> dict[str, int | str]:
    """The `-D` macros of a configuration."""
    macros = dict(collector.defines(config.options))
    if config.exemplars:
        macros["EXEMPLAR_INTERVAL_NS"] = round(config.exemplar_interval * 1e9)
    return macros


def _request(collector: Collector, config: Config, group: int) -> Request:
    forbidden = frozenset(os.environ.get(FORBID, "").split(",")) - {""}
    own = config.collectors[collector.name]
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in own.options.items()}
    return Request(
        collector, options, defines(collector, own), config.bpffs, group, forbidden, compiler.version(), None, ""
    )


def load(
    config: Config, group: int, say: Say, only: frozenset[str] = frozenset(), force: bool = False
) -> dict[str, Outcome]:
    """Brings the pins to what the configuration says. One collector's failure leaves the others in place."""
    preflight()
    pins.prepare_root(config.bpffs, group)
    with _alone(config.state):
        outcomes: dict[str, Outcome] = {}
        if not only:
            outcomes |= _sweep(config)
        wanted = [name for name in config.collectors if not only or name in only]
        pending = []
        for name in wanted:
            request, why = _needed(_request(collectors.BY_NAME[name], config, group), config, force)
            if why == "":
                pins.grant(config.bpffs / name, group)
                outcomes[name] = Outcome("kept", "already loaded")
                continue
            if why:
                say(f"{name}: {why}")
            pending.append(request)
        for request, result in build.run(pending):
            outcomes[request.collector.name] = _record(request, result, config)
        return outcomes


def _needed(request: Request, config: Config, force: bool) -> tuple[Request, str | None]:
    """The request with what is there already, and why it must be built: empty when not, None when nobody need know."""
    name = request.collector.name
    wanted = replace(request, program_hash=program_hash(request))
    pins.remove(config.bpffs / f"{name}{pins.STAGING}")
    try:
        known = manifest.read(config.state, name)
    except DamagedManifest as error:
        return wanted, f"{error}; loading anew"
    folder = config.bpffs / name
    if known is None or not known.maps:
        return wanted, f"{folder} holds pins that no manifest speaks of; loading anew" if os.path.lexists(
            folder
        ) else None
    faults = pins.faults(folder, known)
    if faults.maps:
        return wanted, f"{faults}; loading anew"
    wanted = replace(wanted, known=known)
    if faults:
        return wanted, f"{faults}; attaching again"
    if known.program_hash == wanted.program_hash and not known.error and not force:
        return wanted, ""
    return wanted, None


def _record(request: Request, result: Manifest | str, config: Config) -> Outcome:
    """Writes the manifest, last. A failure keeps what had been loaded before, and is written down too."""
    name = request.collector.name
    if isinstance(result, Manifest):
        manifest.write(config.state, result)
        reused = request.known is not None and request.known.layout_hash == result.layout_hash
        hooks = ", ".join(f"{info.hook} {info.fidelity}" for info in result.programs.values())
        return Outcome("replaced" if reused else "loaded", hooks)
    failed = replace(request.known or Manifest(name), error=result)
    if request.known is None:
        pins.remove(config.bpffs / name)
    pins.remove(config.bpffs / f"{name}{pins.STAGING}")
    manifest.write(config.state, failed)
    return Outcome("failed", result)


def _sweep(config: Config) -> dict[str, Outcome]:
    """Unloads what the configuration no longer names, and leftovers."""
    outcomes = {}
    for name in pins.names(config.bpffs):
        if name not in config.collectors and name.removesuffix(pins.STAGING) not in config.collectors:
            pins.remove(config.bpffs / name)
            outcomes[name] = Outcome("unloaded", "not in the configuration")
    for path in config.state.glob("*.json"):
        if path.stem not in config.collectors:
            path.unlink()
    return outcomes


def unload(config: Config, only: frozenset[str] = frozenset()) -> list[str]:
    """Detaches and unpins; with everything gone, removes both folders too. Returns what was unloaded."""
    require_privileges()
    if not config.bpffs.is_dir() and not config.state.is_dir():
        return []
    with _alone(config.state):
        gone = []
        for name in pins.names(config.bpffs):
            if not only or name in only or name.removesuffix(pins.STAGING) in only:
                pins.remove(config.bpffs / name)
                gone.append(name)
        for name in {path.stem for path in config.state.glob("*.json")} | set(gone):
            if not only or name in only:
                manifest.remove(config.state, name)
    if not pins.names(config.bpffs):
        if config.bpffs.is_dir():
            config.bpffs.rmdir()
        _remove_state(config.state)
    return gone


def _remove_state(state: Path) -> None:
    (state / ".lock").unlink(missing_ok=True)
    with suppress(OSError):  # systemd's RuntimeDirectory, or somebody's files
        state.rmdir()
