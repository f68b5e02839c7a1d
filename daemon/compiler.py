# SPDX-License-Identifier: Apache-2.0
"""C text to bytecode and maps, by bcc. The only file that imports bcc, and only in processes that end soon.

bcc asks for a kernel source tree; it gets `bpf/shim/`, which holds the ten short headers that it reads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import BpfmetricsdError, UnsupportedError
from daemon.layout import Layout, from_bcc

SOURCES = Path(__file__).resolve().parent.parent / "bpf"
_INSTALL = "install the package python3-bpfcc (never 'bcc' from PyPI, which is something else)"


@dataclass(frozen=True, slots=True)
class CompiledMap:
    """A map that bcc created, not pinned: descriptor, and the layouts of key and value."""

    descriptor: int
    key: Layout
    value: Layout


@dataclass(frozen=True, slots=True)
class Compiled:
    """Bytecode by C function, and maps. The bytecode names maps by descriptor number. `owner` keeps them open."""

    functions: dict[str, bytes]
    maps: dict[str, CompiledMap]
    owner: Any


class CompileError(BpfmetricsdError):
    """clang's no."""


def version() -> str:
    """bcc's version, read from its files, because importing it takes LLVM into memory."""
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        raise UnsupportedError(f"bcc is not installed for this Python; {_INSTALL}")
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError as error:
        raise UnsupportedError(f"{found.origin} is not the BPF Compiler Collection; {_INSTALL}") from error
    match = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
    return match.group(1) if match else "unknown"


def first_error(output: str) -> str:
    """The line of clang's output that tells why; empty when there is none."""
    for line in output.splitlines():
        if "error:" in line:
            return line.strip()
    return ""


def compile_text(text: str, flags: Sequence[str]) -> Compiled:
    """Compiles a program and creates its maps. Raises `CompileError`; clang's own words go to descriptor 2."""
    os.environ["BCC_KERNEL_SOURCE"] = str(SOURCES / "shim")
    try:
        import bcc
    except ImportError as error:
        raise UnsupportedError(f"bcc cannot be imported ({error}); {_INSTALL}") from error
    from ctypes import c_char_p, c_ulonglong, c_void_p

    library = bcc.lib
    library.bpf_table_name.restype = c_char_p
    library.bpf_table_name.argtypes = [c_void_p, c_ulonglong]
    try:
        module = bcc.BPF(text=text.encode(), cflags=[*flags, "-Werror=implicit-function-declaration"])
    except Exception as error:  # bcc raises bare Exception
        raise CompileError(f"the program does not compile ({error})") from error
    handle = module.module
    functions = {
        name.decode(): module.dump_func(name)
        for name in (library.bpf_function_name(handle, i) for i in range(library.bpf_num_functions(handle)))
    }
    maps = {
        name.decode(): CompiledMap(
            library.bpf_table_fd(handle, name),
            from_bcc(json.loads(library.bpf_table_key_desc(handle, name))),
            from_bcc(json.loads(library.bpf_table_leaf_desc(handle, name))),
        )
        for name in (library.bpf_table_name(handle, i) for i in range(library.bpf_num_tables(handle)))
    }
    return Compiled(functions, maps, module)
