# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import re

import pytest

from daemon import compiler
from daemon.errors import UnsupportedError


def test_version_is_read_without_importing_bcc() -> None:
    import sys

    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", compiler.version())
    assert "bcc" not in sys.modules


def test_absent_bcc_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="install the package python3-bpfcc"):
        compiler.version()


def test_first_error_is_the_line_that_tells_why() -> None:
    said = "In file included from a:1:\nx.bpf.c:3:5: warning: unused\nx.bpf.c:7:9: error: no member named 'q'\nmore\n"
    assert compiler.first_error(said) == "x.bpf.c:7:9: error: no member named 'q'"
    assert compiler.first_error("LLVM said nothing of use\n") == ""
