# SPDX-License-Identifier: Apache-2.0
"""The page for people in a real browser: the real daemon, real load, and a disk that becomes slow.

`make screenshot` takes the picture of the README: it lets two minutes pass before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from daemon import libbpf, loader, look
from daemon.errors import UnsupportedError
from tests.kernel import incident, png
from tests.kernel.browser import Browser, browser
from tests.kernel.memory import LIMIT_BYTES, named, oom_kill
from tests.prometheus.harness import free_port, wait

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "page.png"
UPDATE = os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1"
CALM_SECONDS = 120 if UPDATE else 6
NAMES = ("biolatency", "runqlat", "tcpretrans", "cachestat", "oomkill", "tcplife")
Lacks = Callable[[str], NoReturn]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def url(lacks: Lacks) -> Iterator[str]:
    """The page of a daemon on a host whose disk is slow now, and was not before."""
    try:
        loader.preflight()
    except UnsupportedError as error:
        lacks(str(error))
    with tempfile.TemporaryDirectory(prefix="bpfmetricsd_test_page_") as name, ExitStack() as undo:
        folder, port = Path(name), free_port()
        folder.chmod(0o755)
        config = folder / "bpfmetricsd.yaml"
        config.write_text(
            f"server: {{listen: '127.0.0.1:{port}'}}\nbpffs: /sys/fs/bpf/{folder.name}\nstate: {folder}/state\n"
            f"journal: false\ncollectors: {{{', '.join(f'{one}: {{}}' for one in NAMES)}}}\n"
        )
        undo.callback(os.close, libbpf.enable_statistics())
        command = [sys.executable, "-m", "daemon"]
        undo.callback(subprocess.run, [*command, "unload", "--config", config], cwd=ROOT, check=True)
        process = subprocess.Popen([*command, "run", "--config", config], cwd=ROOT)
        undo.callback(process.wait, 20)
        undo.callback(process.terminate)
        page = f"http://127.0.0.1:{port}/"
        wait("the daemon", lambda: process.poll() is not None or get(f"{page}-/ready") == "ready\n")
        disk, mount = undo.enter_context(incident.disk(folder))
        undo.enter_context(incident.beside(*incident.work(disk)))
        time.sleep(CALM_SECONDS)
        undo.enter_context(incident.beside(incident.freeze(mount)))
        wait("the slow disk", lambda: "A disk is slow." in get(page))
        if UPDATE:
            time.sleep(20)
        yield page


@pytest.fixture
def tab(lacks: Lacks) -> Iterator[Browser]:
    profile = tempfile.TemporaryDirectory(prefix="bpfmetricsd_browser_", ignore_cleanup_errors=True)
    with profile as folder, browser(Path(folder), lacks) as one:
        yield one


def words(tab: Browser, selector: str) -> str:
    return str(tab.run(f"document.querySelector({selector!r}).innerText"))


def test_it_says_which_resource_is_the_problem(url: str, tab: Browser, tmp_path: Path) -> None:
    tab.size(1280, 900)
    tab.open(url)
    assert tab.complaints() == []
    assert "A disk is slow." in words(tab, "h1")
    assert re.match(r"A disk is slow\. .*", str(tab.run("document.title")))
    heads = tab.run(
        "[...document.querySelectorAll('.head')].map(one => [one.innerText, one.classList.contains('bad')])"
    )
    assert [text.split("\n")[0].strip() for text, _ in heads] == ["DISK", "CPU", "MEMORY", "NETWORK"]
    assert re.search(r"slow\s+loop\d+ write p99 \d", heads[0][0])
    assert heads[0][1]
    assert tab.run("document.querySelector('.head').getBoundingClientRect().bottom") < 250
    for name in NAMES:
        card = words(tab, f"#{name}")
        assert tab.run(f"document.querySelectorAll('#{name} figure svg').length") == 1, name
        assert "no reading" not in card
    assert re.search(r"% CPU\s+\d+ ns a run", words(tab, ".measured"))
    tab.picture(tmp_path / "light.png")
    if UPDATE:
        tab.size(1280, int(tab.run("document.querySelector('.board').getBoundingClientRect().bottom")) + 28)
        tab.picture(tmp_path / "light.png")
        PICTURE.write_bytes(png.small((tmp_path / "light.png").read_bytes()))


def test_it_renews_itself_without_a_reload_and_without_moving(url: str, tab: Browser) -> None:
    tab.size(1280, 500)
    tab.open(url)
    tab.run("window.mine = document.querySelector('h1'); scrollTo(0, 200); getSelection().selectAllChildren(mine)")
    before = words(tab, "header .dim")
    tab.until("the next reading", lambda: words(tab, "header .dim") != before)
    assert tab.run("window.mine === document.querySelector('h1') && mine.isConnected")
    assert tab.run("scrollY") == 200
    assert tab.run("getSelection().toString()").strip() == words(tab, "h1")
    assert len(tab.told("Page.loadEventFired")) == 1
    assert tab.complaints() == []


def test_it_says_when_the_server_no_longer_answers(url: str, tab: Browser) -> None:
    tab.open(url)
    tab.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    tab.until("the notice", lambda: bool(tab.run("document.body.classList.contains('stale')")))
    assert words(tab, ".silent").startswith("No answer since ")
    tab.ask("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    tab.until("the answer", lambda: not tab.run("document.body.classList.contains('stale')"))
    assert tab.run("getComputedStyle(document.querySelector('.silent')).display") == "none"


def test_without_scripts_it_is_complete_and_loads_again(url: str, tab: Browser) -> None:
    tab.scripts(allowed=False)
    tab.open(url)
    text = get(url)
    assert f'<noscript><meta http-equiv="refresh" content="{5}">' in text
    for name in NAMES:
        assert re.search(rf'id="{name}".*?<svg', text, re.DOTALL)
    tab.until("the next page", lambda: len(tab.told("Page.loadEventFired")) == 2)
    assert tab.complaints() == []


@pytest.mark.parametrize("width", [360, 800, 1280, 1920])
def test_nothing_is_wider_than_the_screen(url: str, tab: Browser, tmp_path: Path, width: int) -> None:
    tab.size(width, 740, mobile=width == 360)
    tab.open(url)
    assert tab.run("document.documentElement.scrollWidth") == width
    wide = "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
    assert tab.run(f"{wide}.map(one => one.outerHTML.slice(0, 99))") == []
    if width == 360:  # all four heads can be seen without scrolling
        assert (
            tab.run("Math.max(...[...document.querySelectorAll('.head')].map(x => x.getBoundingClientRect().bottom))")
            < 740
        )
    tab.picture(tmp_path / f"{width}.png", whole=True)


def contrast(tab: Browser, selector: str) -> float:
    """As WCAG 2.1 defines it, of text on the page's ground."""

    def luminance(colour: str) -> float:
        parts = [int(one) / 255 for one in re.findall(r"\d+", colour)[:3]]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = luminance(tab.run(f"getComputedStyle(document.querySelector({selector!r})).color"))
    ground = luminance(tab.run("getComputedStyle(document.documentElement).backgroundColor"))
    return (max(text, ground) + 0.05) / (min(text, ground) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_the_light_and_in_the_dark(url: str, tab: Browser, tmp_path: Path, scheme: str) -> None:
    tab.scheme(scheme)
    tab.open(url)
    ground = tab.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 64) == (scheme == "dark")
    for selector in ("h3", "h1", ".why", ".head.bad .word", ".card td", "figcaption", ".says"):
        assert contrast(tab, selector) >= 4.5, selector
    tab.picture(tmp_path / f"{scheme}.png", whole=True)


def test_the_policy_holds_against_what_it_does_not_name(url: str, tab: Browser) -> None:
    tab.open(url)
    tab.run(
        "document.body.append(Object.assign(document.createElement('img'), {src: '/metrics'}));"
        "document.body.setAttribute('style', 'color: red')"
    )
    assert (
        tab.run("(() => {try {document.body.innerHTML = '<b>x</b>'} catch (error) {return error.name}})()")
        == "TypeError"
    )
    tab.until("the refusals", lambda: len(tab.complaints()) >= 2)
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Security-Policy"] == look.POLICY


def test_a_process_that_is_named_as_markup_is_shown_and_not_run(url: str, tab: Browser) -> None:
    oom_kill("bpfmetricsd-test.service", named(b"<script>a()", 4 * LIMIT_BYTES))
    wait("the kill", lambda: "Memory ran out." in get(url))
    tab.open(url)
    assert re.search(r"The last: <script>a\(\) \(pid \d+\)", words(tab, "#oomkill"))
    assert tab.run("document.querySelectorAll('script').length") == 1
    assert "Memory ran out." in words(tab, "h1")
    assert tab.complaints() == []
