# SPDX-License-Identifier: Apache-2.0
"""What a real Prometheus makes of the daemon's page, of the rules and of the dashboards."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import collectors
from collectors import oomkill
from tests.kernel.net import End
from tests.prometheus import load
from tests.prometheus.harness import (
    JOB,
    NATIVE,
    NEWER,
    NO_NEWER,
    ROOT,
    RULES,
    Daemon,
    Prometheus,
    Receiver,
    Watched,
    get,
    wait,
)

pytestmark = pytest.mark.prometheus
Lacks = Callable[[str], NoReturn]
Promtool = Callable[..., str]
HISTOGRAMS = [
    metric.name
    for collector in collectors.ALL
    for metric in collector.metrics({option.name: option.default for option in collector.options})
    if metric.type == "histogram"
]
DASHBOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))

# Panels that cannot have data here: dashboard, panel, reason.
WITHOUT_DATA: tuple[tuple[str, str, str], ...] = ()


def groups(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((RULES / name).read_text())["groups"]
    return found


def test_it_is_the_version_that_is_meant(prometheus: Prometheus) -> None:
    version = prometheus.ask("status/buildinfo")["version"]
    assert version.startswith("3." if prometheus.name == NEWER else ("2.", "3."))


def test_both_formats_are_scraped(prometheus: Prometheus) -> None:
    assert {dict(labels)["job"] for labels in prometheus.query("up == 1")} >= {JOB, "text"}
    metrics = '__name__=~"bpf.+",__name__!~".+_created"'
    names = [
        {dict(labels)["__name__"] for labels in prometheus.query(f'count by (__name__) ({{job="{job}",{metrics}}})')}
        for job in (JOB, "text")
    ]
    assert names[0] == names[1]


def test_prometheus_refuses_no_sample_and_no_exemplar(prometheus: Prometheus) -> None:
    refused = prometheus.query(
        '{__name__=~"prometheus_target_scrapes_sample_(duplicate|out_of).*_total'
        '|prometheus_tsdb_exemplar_out_of_order_exemplars_total|prometheus_target_scrapes_exceeded_.*_total"}'
    )
    assert len(refused) >= 4
    assert not any(refused.values())


def test_exemplars_of_a_bucket_are_stored(prometheus: Prometheus) -> None:
    found = prometheus.exemplars('bpf_block_io_duration_seconds_bucket{device=~"loop.+"}')
    assert found
    for one in found:
        assert one["labels"].keys() >= {"pid", "comm", "sector"}
        assert float(one["value"]) <= float(one["series"]["le"])


def test_exemplars_of_a_counter_are_stored(prometheus: Prometheus) -> None:
    found = prometheus.exemplars('bpf_tcp_retransmits_total{kind="syn"}')
    assert {one["labels"]["raddr"] for one in found} >= {"127.0.0.1"}


def test_text_has_nothing_that_promtool_minds(daemon: Daemon, promtool: Promtool) -> None:
    page = get(f"{daemon.url}/metrics", "text/plain;version=0.0.4")
    assert promtool("check", "metrics", text=page) == ""


# Native histograms, which Prometheus 3 makes of classic ones


@pytest.fixture
def converting(watched: Watched, lacks: Lacks) -> Prometheus:
    return watched.servers.get(NEWER) or lacks(NO_NEWER)


@pytest.mark.parametrize("metric", HISTOGRAMS)
def test_converted_histograms_agree_with_classic_ones(converting: Prometheus, metric: str) -> None:
    """Both come from the same scrapes, so each question has one answer, for all time and for the last seconds.

    Not in `rate()`, which goes back to where a series may have begun, for each bucket apart or for all at once.
    """
    here, at = (
        f'{{job="{NATIVE}"}}',
        time.time() - 2,
    )  # a scrape that is not stored yet would come between two questions

    def answer(expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        found = converting.query(expr, at)
        return {tuple(pair for pair in labels if pair[0] != "__name__"): value for labels, value in found.items()}

    assert any(answer(f"{metric}_count{here}").values())
    assert answer(f"histogram_count({metric}{here})") == answer(f"{metric}_count{here}")
    assert answer(f"histogram_sum({metric}{here})") == answer(f"{metric}_sum{here}")
    native, classic = f"{metric}{here}", f"{metric}_bucket{here}"
    for what in (native, classic), (f"{native} - {native} offset 10s", f"{classic} - {classic} offset 10s"):
        # No round ones: where the rank is the last of a bucket and empty ones follow, Prometheus' two answers lie at
        # both ends of the gap.
        for q in (0.50123, 0.90171, 0.99013, 0.99917):
            quantiles, expected = (answer(f"histogram_quantile({q}, {one})") for one in what)
            assert quantiles == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_converted_histograms_have_the_exemplars(converting: Prometheus) -> None:
    """All of them: where it converts, Prometheus leaves none to the classic buckets beside."""
    found = converting.exemplars(f'bpf_block_io_duration_seconds{{job="{NATIVE}",device=~"loop.+"}}')
    assert found
    assert all(one["labels"].keys() >= {"pid", "comm", "sector"} for one in found)
    assert not converting.exemplars(f'bpf_block_io_duration_seconds_bucket{{job="{NATIVE}"}}')


# Rules


def test_rules_are_valid(promtool: Promtool) -> None:
    promtool("check", "rules", *RULES.glob("*.yaml"))


def test_rules_do_what_they_promise(promtool: Promtool) -> None:
    promtool("test", "rules", *sorted((RULES / "tests").glob("*.yaml")))


def test_every_alert_is_tested_and_explained() -> None:
    (group,) = groups("alerting.yaml")
    tests = [one for path in (RULES / "tests").glob("*.yaml") for one in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for one in tests for case in one.get("alert_rule_test", ())]
    page = (ROOT / "docs" / "operating.md").read_text()
    assert f"MESSAGE_ID={oomkill.MESSAGE_ID}" in page
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    for alert in group["rules"]:
        name = alert["alert"]
        assert {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name} == {True, False}, name
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert alert["annotations"]["runbook_url"] == f"docs/operating.md#{name.lower()}"
        assert name in headings


def test_the_documented_command_makes_runbook_links_whole(promtool: Promtool, tmp_path: Path) -> None:
    (command,) = re.findall(r"^    (sed .+runbook_url.+)$", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    *words, path = shlex.split(command)
    mine = Path(shutil.copy(RULES / "alerting.yaml", tmp_path))
    assert mine.name == Path(path).name
    subprocess.run([*words, mine], check=True)
    promtool("check", "rules", mine)
    before, after = (re.findall(r"runbook_url: (.+)", one.read_text()) for one in (RULES / mine.name, mine))
    assert after == [f"https://git.example.com/bpfmetricsd/blob/main/{one}" for one in before]


def test_every_record_is_tested() -> None:
    text = "\n".join(path.read_text() for path in (RULES / "tests").glob("*.yaml"))
    records = {rule["record"] for group in groups("recording.yaml") for rule in group["rules"]}
    assert {name for name in records if f"- expr: {name}" not in text} == set()


def test_every_record_has_data(prometheus: Prometheus) -> None:
    rules = [rule for group in groups("recording.yaml") for rule in group["rules"]]
    names = [rule["record"] for rule in rules if "median1d" not in rule["record"]]
    assert [name for name in names if not prometheus.numbers(name)] == []


def test_only_the_waiting_of_the_alerts_is_shortened(rules: Path) -> None:
    """What fires below is what is shipped."""
    assert (rules / "recording.yaml").read_text() == (RULES / "recording.yaml").read_text()
    shipped = (RULES / "alerting.yaml").read_text().splitlines()
    mine = (rules / "alerting.yaml").read_text().splitlines()
    changed = [(old.strip(), new.strip()) for old, new in zip(shipped, mine, strict=True) if old != new]
    waiting = [rule["for"] for group in groups("alerting.yaml") for rule in group["rules"] if "for" in rule]
    assert changed == [(f"for: {time}", f"for: {time[:-1]}s") for time in waiting]


# From the kernel to the one who is on call


def shipped(name: str) -> dict[str, Any]:
    (rule,) = (rule for rule in groups("alerting.yaml")[0]["rules"] if rule["alert"] == name)
    return dict(rule)


def test_an_oom_kill_is_notified(prometheus: Prometheus, watched: Watched, daemon: Daemon, receiver: Receiver) -> None:
    if not watched.load.killed:
        pytest.skip("this kernel has no memory cgroup in which to run out of memory")
    labels = {"alertname": "OomKill", "job": JOB, "server": prometheus.name}
    alert = receiver.wait("firing", **labels)
    instance = f"127.0.0.1:{daemon.port}"
    assert alert["labels"] == labels | {"instance": instance, "scope": "memcg", "severity": "warning"}
    assert alert["annotations"] == {
        "summary": f"{instance}: memory ran out and processes were killed",
        "description": "OOM kills (scope memcg) within 10 minutes: about 1. Kills so far in the cgroups concerned: "
        f"{watched.load.killed} 1;",
        "runbook_url": shipped("OomKill")["annotations"]["runbook_url"],
    }


def test_packet_loss_is_notified(prometheus: Prometheus, watched: Watched, daemon: Daemon, receiver: Receiver) -> None:
    labels = {"alertname": "TcpRetransmitRatio", "job": JOB, "server": prometheus.name}
    alert = receiver.wait("firing", **labels)
    instance = f"127.0.0.1:{daemon.port}"
    assert alert["labels"] == labels | {"instance": instance, "severity": "warning"}
    annotations = alert["annotations"]
    share = re.fullmatch(r"For each segment sent, ([0-9.]+)% are sent again\.", annotations.pop("description"))
    assert share
    assert float(share[1]) / 100 == pytest.approx(watched.load.repeated, rel=0.2)  # two scrapes, at most 1 s apart
    assert annotations == {
        "summary": f"{instance}: TCP loses segments",
        "runbook_url": shipped("TcpRetransmitRatio")["annotations"]["runbook_url"],
    }


@pytest.fixture(scope="module")
def mended(watched: Watched, wire: tuple[End, End], receiver: Receiver) -> None:
    """After all were notified, the wire loses no more."""
    for name in watched.servers:
        receiver.wait("firing", alertname="TcpRetransmitRatio", job=JOB, server=name)
    load.lose_no_more(wire)


@pytest.mark.usefixtures("mended")
def test_the_end_of_packet_loss_is_notified(prometheus: Prometheus, receiver: Receiver) -> None:
    alert = receiver.wait("resolved", alertname="TcpRetransmitRatio", job=JOB, server=prometheus.name)
    assert alert["endsAt"] > alert["startsAt"]


def test_under_load_nothing_is_wrong_with_the_daemon_itself(prometheus: Prometheus) -> None:
    """BpfmetricsdAbsent apart: in the five seconds before its first scrape Prometheus has no target."""
    found = prometheus.series('ALERTS{alertname=~"Bpfmetricsd.+",alertname!="BpfmetricsdAbsent",alertstate="firing"}')
    assert [labels for labels, _ in found] == []


# Dashboards


def substituted(text: str) -> str:
    """As Grafana fills in the variables, for an hour at one point a second."""
    values = {"__rate_interval": "5s", "__interval": "1s", "__range": "1h", "job": JOB, "instance": ".*",
              "device": ".*", "cgroup": ".*"}  # fmt: skip
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], text)


def queries(path: Path) -> Iterator[tuple[str, str]]:
    """Panel and query; annotations too."""
    board: dict[str, Any] = json.loads(path.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], substituted(target["expr"])
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], substituted(annotation["expr"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_has_data(prometheus: Prometheus, path: Path) -> None:
    excused = {title for name, title, _ in WITHOUT_DATA if name == path.name}
    empty = [(title, query) for title, query in queries(path) if not prometheus.numbers(query)]
    assert [one for one in empty if one[0] not in excused] == []
    assert excused <= {title for title, _ in queries(path)}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_that_shows_exemplars_has_some(prometheus: Prometheus, watched: Watched, path: Path) -> None:
    targets = [target for panel in json.loads(path.read_text())["panels"] for target in panel.get("targets", ())]
    asked = [substituted(target["expr"]) for target in targets if target["exemplar"]]
    if not watched.load.killed:
        asked = [query for query in asked if "bpf_oom_kills_total" not in query]
    assert [query for query in asked if not prometheus.exemplars(query)] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_has_values(prometheus: Prometheus, path: Path) -> None:
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found
            assert prometheus.ask(f"label/{found[2]}/values", **{"match[]": substituted(found[1])}), variable["name"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_count_is_lost_by_a_restart(daemon: Daemon, watched: Watched, number: int) -> None:
    """Connections that open while the daemon is away are counted, and no counter falls."""
    opened = f'sum by (job) (bpf_tcp_connections_opened_total{{job=~"{JOB}|{NATIVE}",direction="inbound"}})'
    before = {name: one.query(opened) for name, one in watched.servers.items()}
    daemon.stop(number)
    load.connections(200)
    daemon.start()
    for name, one in watched.servers.items():

        def again(one: Prometheus = one, known: Any = before[name]) -> bool:
            now = one.query(opened)
            return now.keys() == known.keys() and all(value > known[job] + 199 for job, value in now.items())

        wait("the next scrape of each job", again)
        all_counters = '__name__=~"bpf_.+_(total|bucket|count|sum)|bpf_.+_(seconds|bytes)"'
        counters = one.query(f'group by (__name__) ({{job=~"{JOB}|{NATIVE}",{all_counters}}})')
        names = [dict(labels)["__name__"] for labels in counters]
        assert len(names) > 20
        assert (name == NEWER) == (HISTOGRAMS[0] in names)
        fell = [
            (name, dict(labels))
            for name in names
            for labels, resets in one.query(f'resets({name}{{job=~"{JOB}|{NATIVE}"}}[1h])').items()
            if resets
        ]
        assert fell == []
