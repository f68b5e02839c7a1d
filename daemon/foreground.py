# SPDX-License-Identifier: Apache-2.0
"""`run` and `serve`: from root, or whoever started it, to a process that holds no more than serving needs.

What follows the drop of privileges reads no file of the program's own: its folder may be closed to the service's user.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from daemon import lean, libbpf, pins, privileges
from daemon.config import Config
from daemon.engine import Engine
from daemon.errors import BpfmetricsdError, UnsupportedError
from daemon.listening import open_sockets
from daemon.notify import Notifier
from daemon.service import Service

if TYPE_CHECKING:
    from daemon.webconfig import WebConfig

ROOT = Path(__file__).resolve().parent.parent
KEEPS_CAP_BPF = "keeps the capability CAP_BPF, without which this kernel (before 5.19) lets no process read maps"
_FAILED = 1
_LATE_IMPORTS = ("uvicorn.server", "uvicorn.lifespan.off", "encodings.unicode_escape")
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, slots=True)
class Job:
    """`path` is the configuration file, absolute; `user` and its `group` are whom a root process becomes."""

    path: Path
    read: Callable[[Path], Config]
    user: str
    group: int


def serve(job: Job) -> int:
    """Serves until SIGTERM or SIGINT."""
    _end_quietly()
    config = job.read(job.path)
    web = _web(config)
    return _serve(job, config, web, open_sockets(config.server.listen))


def run(job: Job, unload_on_exit: bool) -> int:
    """Loads in a process of its own, then serves. To unload needs root, so that a parent stays root and waits."""
    _end_quietly()
    config = job.read(job.path)
    web = _web(config)
    with contextlib.ExitStack() as undo:
        if unload_on_exit:
            undo.callback(_unload, config)
        status = _load(job)
        if status and not (status == _FAILED and _any_up(config)):
            return status
        sockets = open_sockets(config.server.listen)
        if unload_on_exit and (child := _fork()):
            for sock in sockets:
                sock.close()
            return _guard(child)
        undo.pop_all()
    return _serve(job, config, web, sockets)


def _web(config: Config) -> WebConfig | None:
    """Hashes and certificates take 2 MB, so only where they are asked for."""
    if config.server.web_config is None:
        return None
    from daemon import webconfig

    return webconfig.load(config.server.web_config)


def _end_quietly() -> None:
    """Before the event loop takes the signals: SIGTERM ends with status 0, and there is nothing to read again yet."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _load(job: Job) -> int:
    """`bpfmetricsd load`, whose compiler's memory goes with it. Its exit status.

    It gets a process group of its own, so that an end takes its compilers too, and none of them pins any more.
    """
    command = [sys.executable, "-m", "daemon", "load", "--config", str(job.path), "--user", job.user]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": search}, process_group=0)
    try:
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return status if status >= 0 else _FAILED


def _any_up(config: Config) -> bool:
    engine = Engine(config)
    try:
        return any(one["up"] for one in engine.status()["collectors"].values())
    finally:
        engine.close()


def _unload(config: Config) -> None:
    from daemon import loader  # compiler and all: only here, in a process that is about to end

    with contextlib.suppress(UnsupportedError):
        gone = loader.unload(config)
        print(f"unloaded {', '.join(gone)}" if gone else "nothing was loaded", flush=True)


def _fork() -> int:
    """The child's id here, 0 in the child. The parent takes no signal any more except through `_guard`."""
    every = {*_ENDING, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, every)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, every)
    return child


def _guard(child: int) -> int:
    """Hands signals on to the child until it ends. Its exit status."""
    while True:
        number = signal.sigwait({*_ENDING, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                print(f"bpfmetricsd: the server was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
            return code if code >= 0 else _FAILED


def _serve(job: Job, config: Config, web: WebConfig | None, sockets: Sequence[socket.socket]) -> int:
    logging.basicConfig(format="bpfmetricsd: %(message)s", level=logging.INFO)
    notifier = Notifier()
    with lean.without_tls() if web is None else contextlib.nullcontext():
        from daemon import server
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    bpffs, notes = _step_down(job, config)
    service = Service(job.path, job.read, config, bpffs, notes)
    server.serve(service, sockets, config.interval, notifier, web)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 0


def _step_down(job: Job, config: Config) -> tuple[Path, list[str]]:
    """Root becomes `user`. The folder of pins as the process reaches it then, and what its status must say.

    /sys/fs/bpf is closed to all but root, so the process stands in the folder of pins, and names pins from there.
    """
    if os.geteuid() != 0:
        return config.bpffs, []
    if not config.bpffs.is_dir():
        pins.prepare_root(config.bpffs, job.group)
    if config.bpffs.stat().st_gid != job.group:
        raise BpfmetricsdError(
            f"{config.bpffs} was loaded for another user than {job.user}; run 'bpfmetricsd load --user {job.user}'"
        )
    keep = not reads_maps(job.user, config.bpffs)
    os.chdir(config.bpffs)
    privileges.drop(job.user, keep)
    return Path("."), [KEEPS_CAP_BPF] if keep else []


def reads_maps(user: str, bpffs: Path) -> bool:
    """Whether this kernel lets a process without capabilities read maps: tried in a child that has dropped its own.

    It does since 5.19 (commit "bpf: refine kernel.unprivileged_bpf_disabled behaviour").
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != errno.EPERM
    status = 0
    try:
        os.chdir(bpffs)
        privileges.drop(user, keep_bpf=False)
        status = _lookup()
    finally:
        os._exit(status)


def _lookup() -> int:
    """One lookup in some collector's control map, or in a pin that does not exist. The errno."""
    found = next(Path(".").glob(f"*/{pins.MAPS}/{pins.CONTROL}"), Path("none"))
    try:
        descriptor = libbpf.obj_get(found, libbpf.F_RDONLY)
        libbpf.map_lookup(descriptor, bytes(4), 8)
    except OSError as error:
        return error.errno or 0
    return 0
