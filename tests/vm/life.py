# SPDX-License-Identifier: Apache-2.0
"""Runs as a unit of a guest whose first process is systemd: tries what a container cannot, and writes down what it saw.

The first boot ends with a reboot by systemd; the second finds what the first has left.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SERVER, LOADER, VICTIM = "bpfmetricsd.service", "bpfmetricsd-load.service", "victim.service"
OOM_KILL = "b7a3e0c64f1d4a58933e6c1f0d2b9a84"
URL = "http://127.0.0.1:10435/metrics"
RESULTS = Path("/dev/vdc")
BEEN = Path("/var/lib/been-here")
MEBIBYTES = 48
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
KINDS = (("tp_btf", ""), ("tp_btf,fentry,fexit", ""), ("tp_btf,fentry,fexit", "2"))  # and how paranoid to be
_PATIENCE_S = 400
_EATER = "import sys; b'x' * (1 << 30)"


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_PATIENCE_S)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        time.sleep(1)
    raise AssertionError(f"{what}: not within {_PATIENCE_S} s")


def show(unit: str, key: str) -> str:
    return run("systemctl", "show", "-p", key, "--value", unit).strip()


def scrape() -> dict[str, float]:
    with urllib.request.urlopen(URL, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def status() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("bpfmetricsd", "status", "--json", check=False))
    return found


def drop_in(unit: str, text: str) -> None:
    folder = Path(f"/run/systemd/system/{unit}.d")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.conf").write_text(text)
    run("systemctl", "daemon-reload")


def boots() -> dict[str, Any]:
    """What runs without anybody's doing."""
    ready = wait_for(lambda: show(SERVER, "ActiveState") == "active", f"{SERVER} is ready")
    text = wait_for(lambda: show(SERVER, "StatusText"), "the status")
    first = scrape()
    time.sleep(2)
    return {
        "ready": ready,
        "states": run("systemctl", "is-active", LOADER, SERVER).split(),
        "status": text,
        "collectors": {name: one["up"] for name, one in status()["collectors"].items()},
        "started": {name: one["started"] for name, one in status()["collectors"].items()},
        "first": first,
        "second": scrape(),
        "uptime_s": float(Path("/proc/uptime").read_text().split()[0]),
        "now": time.time(),
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "log": run("journalctl", "-q", "-b", "--no-pager", "-u", "bpfmetricsd*"),
    }


def kills() -> dict[str, Any]:
    """A unit that asks for more memory than it may have."""
    limits = (f"--property=MemoryMax={MEBIBYTES}M", "--property=MemorySwapMax=0")
    run("systemd-run", "--quiet", "--wait", f"--unit={VICTIM}", "--remain-after-exit", *limits,
        "/usr/bin/python3", "-c", _EATER, check=False)  # fmt: skip
    lines = wait_for(
        lambda: run("journalctl", "-q", "--no-pager", "-o", "json", f"MESSAGE_ID={OOM_KILL}").splitlines(), "the entry"
    )
    return {"entries": [json.loads(line) for line in lines], "result": show(VICTIM, "Result"), "page": scrape()}


def limited() -> dict[str, Any]:
    """The server in a memory limit of its own."""
    drop_in(SERVER, f"[Service]\nMemoryMax={MEBIBYTES}M\nMemorySwapMax=0\n")
    before = scrape()
    run("systemctl", "restart", SERVER)
    group = Path("/sys/fs/cgroup") / show(SERVER, "ControlGroup").lstrip("/")
    for _ in range(5):
        after = scrape()
    return {
        "limit": int((group / "memory.max").read_text()),
        "current": int((group / "memory.current").read_text()),
        "events": dict(line.split() for line in (group / "memory.events").read_text().splitlines()),
        "before": before,
        "after": after,
        "restarts": int(show(SERVER, "NRestarts")),
    }


def hooks() -> dict[str, Any]:
    """One collector on the kinds of hooks that few kernels need, loaded within the loader's sandbox."""
    found = {}
    for forbidden, paranoia in KINDS:
        if paranoia:
            PARANOID.write_text(paranoia)
        drop_in(LOADER, f"[Service]\nEnvironment=BPFMETRICSD_FORBID={forbidden}\nExecReload=\n"
                        "ExecReload=/usr/bin/bpfmetricsd load --only cachestat\n")  # fmt: skip
        before, then = scrape(), status()["collectors"]["cachestat"]
        run("systemctl", "reload", LOADER)
        cachestat = status()["collectors"]["cachestat"]
        found[f"{forbidden} {paranoia}".strip()] = {
            "hooks": [program["hook"] for program in cachestat["programs"].values()],
            "up": cachestat["up"],
            "error": cachestat["error"],
            "went_on": cachestat["started"] == then["started"],
            "before": before,
            "after": scrape(),
        }
    run("rm", "-r", f"/run/systemd/system/{LOADER}.d")
    return found


def report(files: Mapping[str, object]) -> None:
    with RESULTS.open("wb") as disk, tarfile.open(fileobj=disk, mode="w|") as archive:
        for name, content in files.items():
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    os.sync()


def main() -> None:
    second = BEEN.exists()
    facts: dict[str, object] = {"boot": Path("/proc/uptime").read_text().split()[0]}
    try:
        for do in (boots,) if second else (boots, kills, limited, hooks):
            print(f"guest: {do.__name__}", flush=True)
            facts[do.__name__] = do()
            report(facts)
    except Exception:
        facts["error"] = traceback.format_exc() + run("journalctl", "-q", "-b", "--no-pager", "-n", "100")
        print(facts["error"], flush=True)
    BEEN.touch()
    report(facts | {"end": ""})
    run("systemctl", "--no-block", "reboot")


if __name__ == "__main__":
    main()
