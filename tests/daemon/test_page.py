# SPDX-License-Identifier: Apache-2.0
"""The page for people, against a golden file, and with names that want to be markup."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from daemon import look, page, pictures
from daemon.cards import CARDS, View
from daemon.histogram import SECONDS
from daemon.model import Distribution
from daemon.recent import Now, Recent, read
from daemon.triage import RESOURCES
from tests.daemon.host import Host, status, view

GOLDEN = Path(__file__).parents[1] / "golden"
EVIL = "<script>alert('&\"')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.time, "localtime", page.time.gmtime)


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text


class Balanced(HTMLParser):
    """Raises where a tag is not closed in its turn; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def rendered(host: Host | None = None, trouble: int = 0) -> str:
    return page.render(status(), view(host or Host(), trouble=trouble), "db1")


def test_page() -> None:
    text = rendered(trouble=6)
    Balanced(text)
    golden("page.html", text.replace(look.STYLE, "…").replace(look.SCRIPT, "…"))


def test_a_page_is_small() -> None:
    assert len(rendered()) < 48 << 10


def test_the_policy_allows_the_texts_that_the_page_has() -> None:
    for tag, text, named in (("style", look.STYLE, look.STYLE_HASH), ("script", look.SCRIPT, look.SCRIPT_HASH)):
        assert rendered().count(f"<{tag}>{text}</{tag}>") == 1
        found = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"sha256-{found}" == named, "the text was edited: put this hash beside it in daemon/look.py"
        assert f"{tag}-src '{named}'" in look.POLICY


def test_nothing_of_it_comes_from_elsewhere_nor_runs_beside_its_own_script() -> None:
    found = Balanced(rendered())
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert not set(found.tags) & {"img", "iframe", "object", "form", "base"}
    targets = [value or "" for name, value in found.attributes if name in ("href", "src")]
    beyond = [
        one for one in targets if not one.startswith(("#", "metrics", "status", "-/ready", "data:image/svg+xml,"))
    ]
    assert beyond == []
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]


def test_everything_that_others_name_is_escaped() -> None:
    host = Host(comm=EVIL, disk=EVIL, cgroup=EVIL)
    made = view(host)
    one = status()["collectors"]["biolatency"] | {"notes": {"a": EVIL}, "lost": {EVIL: 1}}
    one["programs"] = {EVIL: {"hook": f"{EVIL}:{EVIL}", "fidelity": "approximate", "reason": EVIL}}
    every = status()["collectors"] | {"biolatency": one, "runqlat": {"up": False, "error": EVIL}}
    found = status(version=EVIL, kernel=EVIL, ready=False, reasons=[EVIL], notes=[EVIL], collectors=every)
    text = page.render(found, made, EVIL)
    assert Balanced(text).tags.count("script") == 1
    assert text.count("<script") == 1
    assert "alert" in Balanced(text).text


def test_a_process_that_was_killed_is_named_as_it_called_itself() -> None:
    host = Host(comm="<script>")
    view(host)
    host.kill()
    text = page.render(status(), view(host, 3), "db1")
    assert "The last: &lt;script&gt; (pid 4242)" in text


def test_what_is_bad_stands_first_and_in_the_title() -> None:
    calm, bad = Balanced(rendered()).text, rendered(trouble=6)
    assert calm.strip().startswith("All is well. db1")
    assert "<title>A disk is slow. db1</title>" in bad
    assert '<h1 class="bad">A disk is slow.</h1>' in bad
    assert re.search(r'<a class="head bad" href="#biolatency"><h2>Disk</h2>\s<p class="word">slow</p>', bad)
    assert len(re.findall('class="card bad"', bad)) == 1
    assert len(re.findall('class="head calm"', bad)) == 3


def test_a_daemon_that_is_not_well_says_why() -> None:
    every = status()["collectors"] | {"oomkill": {"up": False, "error": "not loaded"}}
    found = status(ready=False, reasons=["oomkill: not loaded"], notes=["keeps CAP_BPF"], collectors=every)
    text = page.render(found, view(Host()), "db1")
    assert '<h1 class="bad">bpfmetricsd is not well.</h1>' in text
    assert '<li class="bad">oomkill: not loaded</li><li class="dim">keeps CAP_BPF</li>' in text
    assert '<p class="bad">not loaded</p>' in text
    assert '<span class="bad">down</span>' in text


def test_events_that_are_lost_now_are_told_at_the_top() -> None:
    recent, host = Recent(), Host()
    for lost in (4, 4, 11):
        host.step()
        host.lost = lost
        recent.keep(read(host.families(), host.seconds))
    now = recent.now(read(host.families(), host.seconds + 1))
    text = page.render(status(), View(now, {one.metric.name: one for one in host.families()}, host.wall), "db1")
    assert "biolatency loses events now: 7 by map_full" in text


def test_every_collector_has_its_card_and_its_picture() -> None:
    assert sorted(CARDS) == sorted(name for names in RESOURCES.values() for name in names)
    text = rendered()
    for name in CARDS:
        card = text.partition(f'id="{name}"')[2].partition("</article>")[0]
        assert "<figure><svg" in card, name
        assert f'href="metrics?collect[]={name}"' in card


def cost_cells(enabled: bool, runs: int) -> list[str]:
    recent, host = Recent(), Host()
    for number in (0, runs):
        host.step()
        host.runs = {"runqlat": number} if runs else {}
        recent.keep(read(host.families(), host.seconds))
    now = recent.now(read(host.families(), host.seconds + 5))
    found = View(now, {one.metric.name: one for one in host.families()}, host.wall)
    text = page.render(status(bpf_stats_enabled=enabled), found, "db1")
    assert ("sysctl kernel.bpf_stats_enabled=1" in text) == ("not counted" in text)
    return re.findall('data-label="Cost">(.*?)</td>', text)[:2]


def test_what_programs_cost_is_told_where_the_kernel_counts_it() -> None:
    assert cost_cells(enabled=False, runs=0) == ["not counted", "not counted"]
    assert cost_cells(enabled=True, runs=0) == ["no run", "no run"]
    assert cost_cells(enabled=False, runs=1000) == ["no run", "&lt; 0.01 % CPU<br>250 ns a run"]


def test_the_first_page_of_all_needs_no_past() -> None:
    host = Host()
    host.step()
    now = Now(read(host.families(), 5.0))
    text = page.render(status(), View(now, {one.metric.name: one for one in host.families()}, host.wall), "db1")
    Balanced(text)
    assert "the first reading" in text
    assert "All is well." in text


def test_collectors_that_are_not_configured_have_no_card() -> None:
    only = {"oomkill": status()["collectors"]["oomkill"]}
    host = Host()
    view(host, 3)
    families = [one for one in host.families() if one.metric.name == "bpf_oom_kills"]
    now = Now(read(families, 5.0))
    text = page.render(status(collectors=only), View(now, {one.metric.name: one for one in families}, 0.0), "db1")
    assert text.count('class="card"') == 1
    assert text.count("not configured") == 3


def test_it_is_complete_without_scripts() -> None:
    assert f'<noscript><meta http-equiv="refresh" content="{page.REFRESH_SECONDS}"></noscript>' in rendered()


def test_the_axis_has_a_place_for_each_bound() -> None:
    bounds = SECONDS.bounds
    assert pictures.at(0.0, bounds, 10.0) == 0
    assert pictures.at(bounds[0], bounds, 10.0) == 10
    assert pictures.at(bounds[-1], bounds, 10.0) == 10 * len(bounds)
    assert pictures.at(float("inf"), bounds, 10.0) == 10 * (len(bounds) + 1)


def test_every_bar_says_what_it_counts_and_what_is_little_can_be_seen() -> None:
    now = Distribution((0, 99_999, 100_000), 100_001, 1.0)
    text = pictures.spectrum("Time.", "seconds", (2.0**-20, 2.0**-10, 1.0), now, now, None)
    assert "<title>0.95 µs to 0.98 ms: 99999</title>" in text
    assert "<title>1 s to ∞: 1</title>" in text
    assert {float(one) >= 1.5 for one in re.findall(r'class="now"[^>]* height="([\d.]+)"', text)} == {True}


def test_a_line_has_gaps_where_nothing_is_known() -> None:
    line = re.search(r' d="(M[^"]+)"', pictures.trail("p99", [1.0, 2.0, None, 1.0]))
    assert line
    assert re.sub(r"[\d. ]+", "", line[1]) == "MLM"
    assert "<path" not in pictures.trail("p99", [None, None])
