# SPDX-License-Identifier: Apache-2.0
"""The checked-in dashboards: current, valid, and each panel with all that a reader needs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

import collectors
from daemon import selfmetrics
from daemon.model import Metric
from grafana import build

RULES = build.FOLDER.parent.parent / "config" / "rules"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "info": ("_info",), "histogram": ("_bucket", "_count", "_sum")}
each = pytest.mark.parametrize("name", build.ALL)


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((build.FOLDER / name).read_text())
    return loaded


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in load(name)["panels"] if panel["type"] != "row"]


def queries(name: str) -> Iterator[str]:
    for panel in panels(name):
        yield from (target["expr"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in load(name)["annotations"]["list"])
    yield from (one["query"] for one in load(name)["templating"]["list"] if one["type"] == "query")


def exported() -> set[str]:
    """The name of every sample that the daemon can give."""
    metrics = [
        metric
        for collector in collectors.ALL
        for metric in collector.metrics({option.name: option.default for option in collector.options})
    ]
    metrics += [metric for metric in vars(selfmetrics).values() if isinstance(metric, Metric)]
    return {metric.name + suffix for metric in metrics for suffix in SUFFIXES[metric.type]}


def test_all_subjects_have_a_dashboard() -> None:
    assert [load(name)["title"] for name in build.ALL] == [
        "Host overview", "Block I/O", "Scheduler", "TCP", "Page cache and OOM", "Fleet", "bpfmetricsd itself",
    ]  # fmt: skip


def test_the_overview_has_the_order_in_which_one_looks() -> None:
    shown = load("host.json")["panels"]
    tiles = [panel["title"].split(":")[0] for panel in shown if panel["type"] == "stat"]
    assert tiles == ["CPU", "Errors", "Errors", "Disk", "Memory", "Network", "Collectors down"]
    assert [panel["title"] for panel in shown if panel["type"] == "row"] == [
        "Load and run queue", "Errors and kills", "Disk", "Memory and page cache", "Network",
    ]  # fmt: skip
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in shown]
    assert places == sorted(places)


def test_every_histogram_is_drawn_as_one() -> None:
    drawn = {
        found
        for name in build.ALL
        for panel in panels(name)
        if panel["type"] == "heatmap"
        for found in re.findall(r"rate\((bpf_\w+)_bucket\{", panel["targets"][0]["expr"])
    }
    assert drawn == {name.removesuffix("_bucket") for name in exported() if name.endswith("_bucket")}


@each
def test_what_is_looked_at_can_be_chosen(name: str) -> None:
    more = {"block-io.json": ["device"], "scheduler.json": ["cgroup"], "memory.json": ["cgroup"]}
    names = [one["name"] for one in load(name)["templating"]["list"]]
    assert names == ["datasource", "job", "instance", *more.get(name, [])]


@each
def test_oom_kills_are_marked(name: str) -> None:
    (kills,) = load(name)["annotations"]["list"]
    assert kills["enable"]
    assert "bpf_oom_kills_total" in kills["expr"]


@each
def test_is_current(name: str) -> None:
    assert (build.FOLDER / name).read_text() == build.text(build.ALL[name]), "run 'python -m grafana.build'"


def test_nothing_else_lies_there() -> None:
    assert {path.name for path in build.FOLDER.iterdir()} == set(build.ALL)
    assert len({load(name)["uid"] for name in build.ALL}) == len(build.ALL)


@each
def test_is_what_the_schema_says(name: str) -> None:
    register_default_plugins()
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(load(name)))) == load(name)


@each
def test_each_panel_is_explained(name: str) -> None:
    for panel in panels(name):
        what, normal, act = panel["description"].split("\n\n")
        assert what.endswith("."), panel["title"]
        assert normal.startswith("**Normal:** "), panel["title"]
        assert act.startswith("**Otherwise:** "), panel["title"]


@each
def test_each_panel_has_a_unit_and_queries(name: str) -> None:
    for panel in panels(name):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@each
def test_heatmaps_are_of_buckets_and_histograms_show_exemplars(name: str) -> None:
    for panel in panels(name):
        for target in panel["targets"]:
            points = re.search(r"_bucket\{|(retransmits|oom_kills)_total\{", target["expr"])
            assert target["exemplar"] == bool(points and target["range"])
            if panel["type"] == "heatmap":
                assert target["format"] == "heatmap"
                assert target["expr"].startswith("sum by (le) (")


@each
def test_panels_do_not_overlap(name: str) -> None:
    places = [panel["gridPos"] for panel in load(name)["panels"]]
    cells = [
        cell
        for place in places
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@each
def test_variables_in_queries_exist(name: str) -> None:
    known = {one["name"] for one in load(name)["templating"]["list"]}
    used = {found for query in queries(name) for found in re.findall(r"\$(\w+)", query)}
    assert used <= known | {"__rate_interval", "__interval", "__range"}
    assert known - used == {"datasource"}


def test_metrics_in_queries_and_rules_exist() -> None:
    groups = [group for path in RULES.glob("*.yaml") for group in yaml.safe_load(path.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    text = "\n".join([rule["expr"] for rule in rules] + [query for name in build.ALL for query in queries(name)])
    named = set(re.findall(r"[a-z_:]*\bbpf(?:metricsd)?_\w+[\w:]*", text))
    assert len(named) > 40
    assert named - recorded - exported() == set()
