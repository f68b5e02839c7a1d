# SPDX-License-Identifier: Apache-2.0
"""Modules without what they import, each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from daemon import lean
from daemon.errors import UnsupportedError


def says(text: str) -> str:
    return subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def test_server_without_a_certificate_has_no_openssl() -> None:
    assert says(
        "import sys; from daemon import lean\n"
        "with lean.without_tls(): from daemon import server\n"
        "print([one for one in ('ssl', '_ssl', 'uvicorn.main', 'asyncio') if one in sys.modules])"
    ) == "['asyncio']"  # fmt: skip


def test_openssl_can_be_imported_afterwards() -> None:
    assert says(
        "from daemon import lean\n"
        "with lean.without_tls(): import asyncio\n"
        "import ssl; print(asyncio.sslproto.ssl, ssl.CERT_REQUIRED.name)"
    ) == "None CERT_REQUIRED"  # fmt: skip


def test_openssl_that_is_there_stays() -> None:
    assert says(
        "import ssl; from daemon import lean\n"
        "with lean.without_tls(): import asyncio\n"
        "import sys; print(asyncio.sslproto.ssl is ssl is sys.modules['ssl'])"
    ) == "True"  # fmt: skip


def test_bare_package_runs_no_init_and_can_be_undone() -> None:
    assert says(
        "import sys; from daemon import lean\n"
        "undo = lean.bare('uvicorn', 'python3-uvicorn')\n"
        "import uvicorn.protocols.utils; print('uvicorn.main' in sys.modules, end=' ')\n"
        "undo(); import uvicorn; print(callable(uvicorn.run))"
    ) == "False True"  # fmt: skip


def test_missing_package_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"^the Python module no_such_module is missing; install the package x$"):
        lean.bare("no_such_module", "x")
