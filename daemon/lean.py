# SPDX-License-Identifier: Apache-2.0
"""Modules without what they import and we do not use.

Some libraries import all they have at once: prometheus-client its HTTP servers, and with them Python's e-mail and URL
modules, uvicorn its command line, asyncio OpenSSL. A server of 32 MB that needs one module of each does not have to
carry the rest.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from daemon.errors import UnsupportedError


def bare(package: str, install: str) -> Callable[[], None]:
    """Lets the modules of a package be imported without running its `__init__`; returns what undoes it.

    Does nothing where the package is imported already. Raises `UnsupportedError` where it is missing.
    """
    if package in sys.modules:
        return lambda: None
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UnsupportedError(f"the Python module {package} is missing; install the package {install}")
    sys.modules[package] = importlib.util.module_from_spec(spec)

    def undo() -> None:
        """Whoever imports the package later gets the whole of it."""
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]

    return undo


@contextmanager
def without_tls() -> Iterator[None]:
    """While it lasts, asyncio and uvicorn can be imported without `ssl`, which takes 4 MB.

    asyncio is made for Pythons that have none. uvicorn names a few things of it and uses none where there is no
    certificate. Does nothing where `ssl` is imported already.
    """
    if "ssl" in sys.modules:
        yield
        return
    stub = ModuleType("ssl", "What uvicorn's configuration names.")
    vars(stub).update(PROTOCOL_TLS_SERVER=16, CERT_NONE=0, SSLContext=object)
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: there is no such module
    try:
        modules["ssl"] = None
        importlib.import_module("asyncio")
        modules["ssl"] = stub
        yield
    finally:
        modules.pop("ssl", None)
