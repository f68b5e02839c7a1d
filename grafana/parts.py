# SPDX-License-Identifier: Apache-2.0
"""What the dashboards share: panels of one look, each with a description in three parts, and PromQL that recurs.

Queries are written with short selectors: HOST, DISK and GROUP stand for matchers of the dashboard's variables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap as heatmaps
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale

__all__ = ["ANY", "Column", "Dashboard", "Help", "Query", "board", "buckets", "graph", "grown", "heatmap", "quantile",
           "row", "table", "tile", "total", "variable"]  # fmt: skip

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HOST = 'job=~"$job",instance=~"$instance"'
_SELECTORS = {"HOST": _HOST, "DISK": f'{_HOST},device=~"$device"', "GROUP": f'{_HOST},cgroup=~"$cgroup"'}
_GREEN, _YELLOW, _RED = "green", "#EAB839", "red"
_EXEMPLARS = re.compile(r"_bucket\{|(retransmits|oom_kills)_total\{")  # what has them
ANY = (0.5, 1)  # steps of a number of bad things: one is red


@dataclass(frozen=True)
class Help:
    """A panel's description: what it shows, what is normal, and what to do when it is not."""

    what: str
    normal: str
    act: str

    def __str__(self) -> str:
        return f"{self.what}\n\n**Normal:** {self.normal}\n\n**Otherwise:** {self.act}"


@dataclass(frozen=True)
class Query:
    """`instant`: at the end of the time range only."""

    expr: str
    legend: str = ""
    instant: bool = False


# PromQL


def full(expr: str) -> str:
    """The query as Grafana gets it."""
    return re.sub(r"\b(HOST|DISK|GROUP)\b", lambda found: _SELECTORS[found[1]], expr)


def buckets(metric: str, selector: str = "HOST") -> str:
    return f"rate({metric}_bucket{{{selector}}}[$__rate_interval])"


def quantile(q: float, metric: str, selector: str = "HOST", by: str = "") -> str:
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({buckets(metric, selector)}))"


def grown(counter: str, selector: str, by: str) -> str:
    """How much a counter grew since the point before, exactly, also where its series begins with the first event.

    `increase()` does not see that event: nothing was there before it. Nothing counts as 0 where the host was scraped.
    """
    now = f"{counter}{{{selector}}}"
    before = f"({now} offset $__interval or 0 * {now} and on (job, instance) up{{HOST}} offset $__interval == 1)"
    return f"clamp_min(sum by ({by}) ({now} - {before}), 0)"


def total(series: str) -> Query:
    """How many events the dashboard's time range has; `series` is a sum that exists before the first event."""
    return Query(f"round(sum(increase(({series})[$__range:$__interval])))", instant=True)


def _target(query: Query, number: int) -> prometheus.Dataquery:
    """Exemplars are where histograms and counters of events are asked for themselves."""
    target = (
        prometheus.Dataquery()
        .expr(full(query.expr))
        .legend_format(query.legend or "__auto")
        .ref_id(chr(ord("A") + number))
        .exemplar(not query.instant and bool(_EXEMPLARS.search(query.expr)))
    )
    return target.instant() if query.instant else target.range()


# Panels

P = TypeVar("P", stats.Panel, timeseries.Panel, heatmaps.Panel, tables.Panel)


def _panel(panel: P, title: str, unit: str, help: Help, width: int, height: int) -> P:
    return panel.title(title).description(str(help)).datasource(SOURCE).unit(unit).span(width).height(height)


def _thresholds(warn: float, bad: float) -> builders.ThresholdsConfig:
    """Green, yellow from `warn` on, red from `bad` on; the other way round when low is bad."""
    colors = (_GREEN, _YELLOW, _RED) if warn < bad else (_RED, _YELLOW, _GREEN)
    steps = list(zip((None, *sorted((warn, bad))), colors, strict=True))
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(
        [models.Threshold(value, color) for value, color in steps]
    )  # fmt: skip


def _to(uid: str, title: str) -> builders.DashboardLink:
    variables = "${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"
    return builders.DashboardLink(title).type(models.DashboardLinkType.LINK).url(
        f"/d/{uid}?${{__url_time_range}}&{variables}"
    )  # fmt: skip


def tile(
    title: str,
    unit: str,
    help: Help,
    query: Query,
    steps: tuple[float, float] | None = None,
    width: int = 4,
    to: str = "",
) -> stats.Panel:
    """One number, on a green, yellow or red ground where it has `steps`, with its course and a link to `to`."""
    panel = (
        _panel(stats.Panel(), title, unit, help, width, 5)
        .with_target(_target(query, 0))
        .color_mode(common.BigValueColorMode.BACKGROUND if steps else common.BigValueColorMode.NONE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("no data")
    )
    if steps:
        panel.thresholds(_thresholds(*steps))
    return panel.links([_to(to, "Details")]) if to else panel


def graph(
    title: str, unit: str, help: Help, *queries: Query, width: int = 12, height: int = 8, stack: bool = False
) -> timeseries.Panel:
    panel = (
        _panel(timeseries.Panel(), title, unit, help, width, height)
        .targets([_target(query, number) for number, query in enumerate(queries)])
        .line_width(1)
        .fill_opacity(25 if stack else 8)
        .show_points(common.VisibilityMode.AUTO)
        .min(0)
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )  # fmt: skip
    return panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL)) if stack else panel


def heatmap(title: str, unit: str, help: Help, series: str, width: int = 12) -> heatmaps.Panel:
    """The distribution over time, with exemplars as points; `series` are rates of buckets."""
    target = _target(Query(f"sum by (le) ({series})", "{{le}}"), 0).format(prometheus_models.PromQueryFormat.HEATMAP)
    return (
        _panel(heatmaps.Panel(), title, unit, help, width, 9)
        .with_target(target)
        .max_data_points(120)
        .calculate(False)
        .y_axis(heatmaps.YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
        .cell_values(heatmaps.CellValues().unit("cps"))
        .color(
            heatmaps.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Spectral")
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .reverse(True)
        )
        .filter_values(heatmaps.FilterValueRange().le(1e-9))
        .tooltip(heatmaps.HeatmapTooltip().mode(common.TooltipDisplayMode.SINGLE).y_histogram(True))
        .exemplars_color("rgba(255,0,255,0.7)")
        .show_legend()
    )


@dataclass(frozen=True)
class Column:
    """A table's column; `steps` colours its cells as a tile, and one without a title is not shown."""

    title: str
    expr: str
    unit: str = "short"
    steps: tuple[float, float] | None = None


def table(
    title: str, help: Help, columns: Sequence[Column], sort: str = "", width: int = 24, height: int = 9, to: str = ""
) -> tables.Panel:
    """Instant queries side by side: a row for each label set. Worst first: `sort` names a column, largest on top."""
    letters = [chr(ord("A") + number) for number in range(len(columns))]
    panel = _panel(tables.Panel(), title, "short", help, width, height).targets(
        [
            _target(Query(column.expr, instant=True), number).format(prometheus_models.PromQueryFormat.TABLE)
            for number, column in enumerate(columns)
        ]
    )
    names = {f"Value #{letter}" if len(columns) > 1 else "Value": column.title
             for letter, column in zip(letters, columns, strict=True)}  # fmt: skip
    hidden = {"Time": True} | {name: True for name, shown in names.items() if not shown}
    panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": names})
    )
    for column in columns:
        properties = [models.DynamicConfigValue("unit", column.unit)]
        if column.steps:
            properties += [
                models.DynamicConfigValue("thresholds", _thresholds(*column.steps).build()),
                models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}),
            ]
        panel.override_by_name(column.title, properties)
    if to:
        link = {"title": "This host", "url": f"/d/{to}?${{__url_time_range}}&${{datasource:queryparam}}"
                "&var-job=${__data.fields.job}&var-instance=${__data.fields.instance}"}  # fmt: skip
        panel.override_by_name("instance", [models.DynamicConfigValue("links", [link])])
    return panel.sort_by([common_builders.TableSortByFieldState().display_name(sort).desc(True)]) if sort else panel


def row(title: str) -> builders.Row:
    return builders.Row(title)


# Dashboards


def variable(name: str, metric: str, several: bool = True) -> builders.QueryVariable:
    """A variable whose values are those of the label of its name.

    All jobs are those that have bpfmetricsd; all values of another label include none at all.
    """
    query = full(f"label_values({metric}, {name})")
    made = (
        builders.QueryVariable(name)
        .label(name)
        .datasource(SOURCE)
        .query(query)
        .definition(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if several:
        made.current(models.VariableOption(text="All", value="$__all"))
    return made if name == "job" or not several else made.all_value(".*")


def _kills() -> builders.AnnotationQuery:
    return (
        builders.AnnotationQuery()
        .name("OOM kills")
        .datasource(SOURCE)
        .enable(True)
        .icon_color(_RED)
        .expr(full(grown("bpf_oom_kills_total", "HOST", "instance, scope, cgroup") + " > 0"))
        .step("60s")
        .title_format("OOM kill on {{instance}}")
        .text_format("{{cgroup}} ({{scope}})")
    )


def board(
    uid: str,
    title: str,
    description: str,
    panels: Sequence[Builder[Panel] | builders.Row],
    *variables: builders.QueryVariable,
    several: bool = True,
) -> Dashboard:
    """A dashboard of one host (`several=False`) or of any number, with these variables after job and instance."""
    made = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["bpfmetricsd"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(builders.DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(variable("job", "bpfmetricsd_build_info"))
        .with_variable(variable("instance", 'bpfmetricsd_build_info{job=~"$job"}', several))
        .annotation(_kills())
        .link(
            builders.DashboardLink("bpfmetricsd")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["bpfmetricsd"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    for one in variables:
        made.with_variable(one)
    for panel in panels:
        if isinstance(panel, builders.Row):
            made.with_row(panel)
        else:
            made.with_panel(panel)
    return _numbered(made.build())


def _numbered(made: Dashboard) -> Dashboard:
    """Grafana wants an id in each panel, for links to it."""
    for number, panel in enumerate(made.panels or [], 1):
        panel.id_val = number
    return made
