# SPDX-License-Identifier: Apache-2.0
"""Loads every collector into the running kernel, once for each set of forbidden hook kinds, and prints JSON.

{forbidden: {collector: {"seconds": …, "hooks": [program, hook, fidelity], "refused": {…}, "error": …}}}
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import collectors
from daemon import loader, manifest
from daemon.config import parse

FORBIDDEN = ("", "tp_btf", "tp_btf,fentry,fexit")


def outcomes(forbidden: str) -> dict[str, object]:
    text = "collectors: {" + ", ".join(f"{one.name}: {{}}" for one in collectors.ALL) + "}\n"
    config = parse(text, "guest", {one.name: one.options for one in collectors.ALL})
    config = replace(config, bpffs=Path("/sys/fs/bpf/bpfmetricsd_loads"), state=Path("/run/bpfmetricsd_loads"))
    os.environ[loader.FORBID] = forbidden
    found: dict[str, object] = {}
    try:
        for name in config.collectors:
            begun = time.monotonic()
            outcome = loader.load(config, 0, lambda text: print(text, file=sys.stderr), only=frozenset({name}))[name]
            known = manifest.read(config.state, name)
            programs = known.programs if known else {}
            found[name] = {
                "seconds": round(time.monotonic() - begun, 1),
                "hooks": [[program, info.hook, info.fidelity] for program, info in programs.items()],
                "refused": dict(known.refused) if known else {},
                "error": outcome.detail if outcome.action == "failed" else "",
            }
            print(f"{forbidden or '-'}: {name}: {outcome.action}: {outcome.detail}", file=sys.stderr, flush=True)
    finally:
        loader.unload(config)
    return found


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump({forbidden: outcomes(forbidden) for forbidden in FORBIDDEN}, file, indent=1)
