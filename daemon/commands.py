# SPDX-License-Identifier: Apache-2.0
"""What each command does: arguments in, exit status out.

Each imports what it needs when it runs, so that the server never holds what the compiler needs.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.foreground import Job

INSTALLED_CONFIG = Path("/etc/bpfmetricsd/bpfmetricsd.yaml")
SHIPPED_CONFIG = Path(__file__).resolve().parent.parent / "config" / "bpfmetricsd.yaml"


def complain(*problems: str) -> None:
    """One line on stderr for each."""
    for problem in problems:
        print(f"bpfmetricsd: {' '.join(problem.split())}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    from daemon import foreground

    return foreground.run(_job(arguments), arguments.unload_on_exit)


def serve(arguments: argparse.Namespace) -> int:
    from daemon import foreground

    return foreground.serve(_job(arguments))


def load(arguments: argparse.Namespace) -> int:
    from daemon import loader, manifest, screen

    config = read_config(arguments.config)
    for name in arguments.only:
        if name not in config.collectors:
            raise UsageError(f"{name} is not in {arguments.config}; {_known(name, config.collectors)}")
    _, group = _account(arguments.user)
    outcomes = loader.load(config, group, complain, arguments.only, arguments.force)
    rows = []
    for name, outcome in outcomes.items():
        if outcome.action == "failed":
            complain(f"{name}: {outcome.detail}")
        try:
            known = manifest.read(config.state, name)
        except manifest.DamagedManifest:
            known = None
        programs = known.programs.values() if known else ()
        hooks = ", ".join(f"{info.hook} {info.fidelity}" for info in programs)
        rows.append((name, outcome.action, hooks or outcome.detail))
    for line in screen.columns(rows) if rows else ():
        print(line)
    return int(any(outcome.action == "failed" for outcome in outcomes.values()))


def unload(arguments: argparse.Namespace) -> int:
    from daemon import loader, pins

    config = _where(arguments.config)
    loader.require_privileges()
    present = [name.removesuffix(pins.STAGING) for name in pins.names(config.bpffs)]
    known = {*config.collectors, *present}
    for name in arguments.only - known:
        raise UsageError(f"{name} is neither in {arguments.config} nor in {config.bpffs}; {_known(name, known)}")
    gone = loader.unload(config, arguments.only)
    print(f"unloaded {', '.join(gone)}" if gone else f"nothing was loaded in {config.bpffs}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    import collectors
    from daemon import compiler, loader, screen, webconfig
    from daemon.attach import Planner
    from daemon.btf import Btf

    config = read_config(arguments.config)
    if config.server.web_config:
        webconfig.load(config.server.web_config)
    print(f"{arguments.config}: no faults; {len(config.collectors)} collectors", flush=True)
    look, status = screen.style(sys.stdout), 0
    forbidden = frozenset(os.environ.get(loader.FORBID, "").split(",")) - {""}
    btf = Btf()
    for name, own in config.collectors.items():
        collector = collectors.BY_NAME[name]
        try:
            plan = Planner(collector, loader.defines(collector, own), btf, forbidden).plan()
            print("\n".join(screen.check(name, plan, look)), flush=True)
        except UnsupportedError as error:
            complain(str(error))
            status = error.status
    print(
        f"This is what the kernel's BTF allows; nothing was loaded. 'load' compiles with bcc {compiler.version()}, and"
        " where the kernel refuses a program then, its next hook takes the place."
    )
    return status


def status(arguments: argparse.Namespace) -> int:
    import shutil

    from daemon import screen
    from daemon.engine import Engine
    from daemon.service import describe

    config = read_config(arguments.config)
    _require_sight(config)
    engine = Engine(config)
    try:
        found = describe(engine, config.bpffs)
    finally:
        engine.close()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        width = shutil.get_terminal_size((120, 24)).columns
        print("\n".join(screen.status(found, time.time(), screen.style(sys.stdout), width)))
    return 0 if found["ready"] else 1


def show(arguments: argparse.Namespace) -> int:
    from daemon import screen, show
    from daemon.engine import Engine

    config = read_config(arguments.config)
    name = arguments.collector
    if name not in config.collectors:
        raise UsageError(f"{name} is not in {arguments.config}; {_known(name, config.collectors)}")
    _require_sight(config)
    view = show.View(arguments.by, arguments.interval, screen.style(sys.stdout).bold)
    engine = Engine(config)
    try:
        show.watch(lambda: engine.decode(name), view, arguments.count, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print()
    finally:
        engine.close()
    return 0


def list_collectors(_: argparse.Namespace) -> int:
    import collectors
    from daemon import screen

    print("\n".join(screen.collectors(collectors.ALL, screen.style(sys.stdout))))
    return 0


# What they share


def default_config() -> Path:
    return INSTALLED_CONFIG if INSTALLED_CONFIG.exists() else SHIPPED_CONFIG


def read_config(path: Path) -> Config:
    """The checked configuration. Raises UsageError with every fault."""
    import collectors
    from daemon import config

    return config.load(path, {collector.name: collector.options for collector in collectors.ALL})


def _where(path: Path) -> Config:
    """The configuration, for its folders. Faults in the installed file do not keep the programs attached."""
    from daemon.config import Config

    try:
        return read_config(path)
    except UsageError as error:
        if path != default_config():
            raise
        config = Config(collectors={})
        complain(*error.problems, f"going on with {config.bpffs} and {config.state}, which are the default")
        return config


def _known(name: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name.lower(), known, 1)
    return f"{f'did you mean {close[0]}? ' if close else ''}known: {', '.join(sorted(known))}"


def _account(user: str | None) -> tuple[str, int]:
    """The user that serves, and its primary group, which may read the pins."""
    from daemon import privileges

    name = user or privileges.default_user()
    try:
        return name, pwd.getpwnam(name).pw_gid
    except KeyError:
        raise UsageError(f"--user {name}: there is no such user; create it, or name another such as nobody") from None


def _job(arguments: argparse.Namespace) -> Job:
    from daemon.foreground import Job

    user, group = _account(arguments.user)
    if pwd.getpwnam(user).pw_uid == 0:
        raise UsageError(f"--user {user}: the server is never root; name an ordinary user such as nobody")
    return Job(arguments.config, read_config, user, group)


def _require_sight(config: Config) -> None:
    """A folder that this user cannot look into would read as one where nothing is loaded."""
    try:
        config.bpffs.stat()
        seen = os.access(config.bpffs, os.R_OK | os.X_OK)
    except PermissionError:
        seen = False
    except OSError:
        seen = True
    if not seen:
        where = config.server.listen[0]
        raise UnsupportedError(
            f"{config.bpffs} is closed to this user; use sudo, or ask the server: curl http://{where}/status"
        )
