# SPDX-License-Identifier: Apache-2.0
"""What a real Prometheus makes of the daemon's page, of the rules and of the dashboards."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from collectors import oomkill
from tests.prometheus import load
from tests.prometheus.harness import JOB, ROOT, RULES, Daemon, Prometheus, get, wait

pytestmark = pytest.mark.prometheus
Program = Callable[[str], str]
DASHBOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))

# Panels that cannot have data here: dashboard, panel, reason.
WITHOUT_DATA: tuple[tuple[str, str, str], ...] = ()


def promtool(program: Program, *words: str | Path, text: bytes = b"") -> str:
    done = subprocess.run([program("promtool"), *words], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


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


def test_text_has_nothing_that_promtool_minds(daemon: Daemon, program: Program) -> None:
    page = get(f"{daemon.url}/metrics", "text/plain;version=0.0.4")
    assert promtool(program, "check", "metrics", text=page) == ""


def test_rules_are_valid(program: Program) -> None:
    promtool(program, "check", "rules", *RULES.glob("*.yaml"))


def test_rules_do_what_they_promise(program: Program) -> None:
    promtool(program, "test", "rules", *sorted((RULES / "tests").glob("*.yaml")))


def test_every_alert_is_tested_and_explained() -> None:
    (group,) = yaml.safe_load((RULES / "alerting.yaml").read_text())["groups"]
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


def test_every_record_has_data(prometheus: Prometheus) -> None:
    groups = yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"] if "median1d" not in rule["record"]]
    assert [name for name in names if not prometheus.numbers(name)] == []


def test_the_kill_is_an_alert(prometheus: Prometheus) -> None:
    if not any(prometheus.numbers("instance_scope:bpf_oom_kills:sum")):
        pytest.skip("this machine has no memory cgroup in which to run out of memory")
    assert prometheus.numbers('ALERTS{alertname="OomKill",alertstate="firing",job="bpfmetricsd"}')


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
def test_every_variable_has_values(prometheus: Prometheus, path: Path) -> None:
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found
            assert prometheus.ask(f"label/{found[2]}/values", **{"match[]": substituted(found[1])}), variable["name"]


def test_no_count_is_lost_by_a_crash(daemon: Daemon, prometheus: Prometheus) -> None:
    opened = f'sum(bpf_tcp_connections_opened_total{{job="{JOB}",direction="inbound"}})'
    (before,) = prometheus.query(opened).values()
    daemon.stop(signal.SIGKILL)
    load.connections(200)
    daemon.start()
    wait("the next scrape", lambda: list(prometheus.query(opened).values())[:1] > [before + 199])
    counters = prometheus.query(f'group by (__name__) ({{job="{JOB}",__name__=~"bpf_.+_(total|bucket|count|sum)"}})')
    names = [dict(labels)["__name__"] for labels in counters]
    assert len(names) > 20
    fell = [
        (name, dict(labels))
        for name in names
        for labels, resets in prometheus.query(f'resets({name}{{job="{JOB}"}}[1h])').items()
        if resets
    ]
    assert fell == []
