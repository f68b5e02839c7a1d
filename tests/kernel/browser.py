# SPDX-License-Identifier: Apache-2.0
"""A real headless Chromium, spoken to over a pipe in its DevTools protocol: no driver, no library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any, NoReturn

PATIENCE = 30
_NAMES = ("chromium", "chromium-headless-shell", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


@dataclass
class Browser:
    """One page. `events` are what it told of itself, in order."""

    commands: int
    answers: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _rest: bytes = b""
    _number: int = 0

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for one in self._take(end - time.monotonic()):
                if one.get("id") == self._number:
                    assert "error" not in one, f"{method}: {one['error']}"
                    found: dict[str, Any] = one["result"]
                    return found
        raise AssertionError(f"{method} was not answered within {PATIENCE} s")

    def _take(self, seconds: float) -> Iterator[dict[str, Any]]:
        if not select([self.answers], [], [], max(0.0, seconds))[0]:
            return
        raw = os.read(self.answers, 1 << 20)
        assert raw, "the browser ended"
        *whole, self._rest = (self._rest + raw).split(b"\0")
        for one in map(json.loads, whole):
            if "method" in one:
                self.events.append(one)
            yield one

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{what} did not come within {PATIENCE} s"
            for _ in self._take(0.1):
                pass

    def open(self, url: str) -> None:
        """And forgets what earlier pages told."""
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.until(f"{url}", lambda: self.told("Page.loadEventFired") != [])

    def told(self, method: str) -> list[dict[str, Any]]:
        return [one["params"] for one in self.events if one["method"] == method]

    def complaints(self) -> list[str]:
        """What a developer would see in red: errors of scripts, of the network, of the policy."""
        logged = [one["entry"]["text"] for one in self.told("Log.entryAdded")]
        said = [str(one["args"]) for one in self.told("Runtime.consoleAPICalled")]
        thrown = [str(one["exceptionDetails"]) for one in self.told("Runtime.exceptionThrown")]
        issues = [str(one["issue"]) for one in self.told("Audits.issueAdded")]
        return logged + said + thrown + issues

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, in a world that the page's policy does not reach."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def size(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def scheme(self, name: str) -> None:
        """`dark` or `light`, as the person prefers it."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def scripts(self, allowed: bool) -> None:
        self.ask("Emulation.setScriptExecutionDisabled", value=not allowed)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, optimizeForSpeed=False)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path, lacks: Callable[[str], NoReturn]) -> Iterator[Browser]:
    """`folder` is for its profile. All of its processes are in one group, which ends with the test."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        lacks("chromium is not installed; run 'packaging/bootstrap test', or apt install chromium")
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()
    # It reads descriptor 3 and writes 4; bash, as other shells take descriptors of one digit only.
    script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    process = subprocess.Popen(
        ["/bin/bash", "-c", script, "bash", found, f"--user-data-dir={folder}", *_FLAGS],
        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        one = Browser(commands, answers)
        target = one.ask("Target.createTarget", url="about:blank")["targetId"]
        one.session = one.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            one.ask(f"{domain}.enable")
        yield one
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(commands)
        os.close(answers)
