# SPDX-License-Identifier: Apache-2.0
"""Pages are compared with literals and golden files, and read back with prometheus-client's two parsers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import prometheus_client.openmetrics.parser
import prometheus_client.parser
import prometheus_client.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric as ParsedMetric

from daemon import exposition
from daemon.exposition import Renderer, canonical_float
from daemon.model import Distribution, Exemplar, Family, Metric, MetricType, Series

# Annotated because prometheus-client's are not, in the oldest version that is supported.
float_to_go_string: Callable[[float], str] = prometheus_client.utils.floatToGoString
parse_openmetrics: Callable[[str], Iterable[ParsedMetric]] = (
    prometheus_client.openmetrics.parser.text_string_to_metric_families
)
parse_text: Callable[[str], Iterable[ParsedMetric]] = prometheus_client.parser.text_string_to_metric_families

GOLDEN = Path(__file__).parents[1] / "golden"
NOW = 1_700_000_000.123

COUNTER = Metric("events", "counter", "Events.", ("kind",))
GAUGE = Metric("level", "gauge", "Level.")
HISTOGRAM = Metric("latency_seconds", "histogram", "Latency.", ("device",), "seconds", (2.0**-20, 2.0**-10, 1.0))


def counter(exemplar: Exemplar | None, value: int = 1) -> list[Family]:
    return [Family(COUNTER, [Series(("a",), value, exemplar=exemplar)])]


def openmetrics(families: Sequence[Family]) -> str:
    return Renderer().render(families, openmetrics=True).decode()


def text(families: Sequence[Family]) -> str:
    return Renderer().render(families, openmetrics=False).decode()


# Golden files

PID = (("pid", "4242"), ("comm", 'we"ird\\\n'))
PAGE = [
    Family(
        replace(HISTOGRAM, labels=("device", "operation")),
        [
            Series(
                ("nvme0n1", "read"),
                Distribution((0, 3, 4), 5, 2.5, {1: Exemplar(PID, 0.0007, NOW), 3: Exemplar((), 2.0, NOW + 1)}),
                created=NOW - 60,
            ),
            Series(("sda", 'quote " slash \\ newline \n brace } hash # {'), Distribution((0, 0, 0), 0, 0.0)),
        ],
    ),
    Family(
        Metric("sent_bytes", "histogram", "Sizes.", unit="bytes", bounds=(1.0, 2.0**19, 2.0**20, 2.0**30)),
        [Series((), Distribution((1, 2, 3, 4), 4, 2**40))],
    ),
    Family(
        replace(COUNTER, help='Line one,\nline "two" \\ end.'),
        [Series(("a",), 2**64 - 1, NOW - 60, Exemplar(PID, 1.0, NOW)), Series(("b",), 0.1)],
    ),
    Family(Metric("nothing", "counter", "No series yet.", ("kind",)), []),
    Family(GAUGE, [Series((), -0.25)]),
    Family(Metric("build", "info", "Versions.", ("version", "kernel")), [Series(("1.0", "6.1.0-\u00e9"), 1)]),
]


@pytest.mark.parametrize("name", ["exposition.om.txt", "exposition.txt"])
def test_golden(name: str) -> None:
    page = Renderer().render(PAGE, openmetrics=".om." in name)
    if os.environ.get("BPFMETRICSD_UPDATE_GOLDEN") == "1":
        (GOLDEN / name).write_bytes(page)
    assert page.decode() == (GOLDEN / name).read_text(encoding="utf-8")


# Literals


def test_empty_page() -> None:
    assert openmetrics([]) == "# EOF\n"
    assert text([]) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (-3, "-3"),
        (10**17, "100000000000000000"),
        (2**64, "18446744073709551616"),
        (True, "1"),
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
        (1e22, "1e+22"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_values(value: float, expected: str) -> None:
    families = [Family(GAUGE, [Series((), value)])]
    assert text(families).splitlines()[-1] == f"level {expected}"
    assert openmetrics(families).splitlines()[-2] == f"level {expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0**-20, "9.5367431640625e-07"),
        (2.0**-14, "6.103515625e-05"),
        (2.0**-13, "0.0001220703125"),
        (2.0**-10, "0.0009765625"),
        (0, "0.0"),
        (1, "1.0"),
        (32.0, "32.0"),
        (100000.5, "100000.5"),
        (2.0**19, "524288.0"),
        (1e6, "1e+06"),
        (2.0**20, "1.048576e+06"),
        (2.0**30, "1.073741824e+09"),
        (1e10, "1e+10"),
        (2.0**64, "1.8446744073709552e+19"),
        (1e100, "1e+100"),
        (math.inf, "+Inf"),
    ],
)
def test_canonical_float(value: float, expected: str) -> None:
    assert canonical_float(value) == expected


def test_canonical_float_agrees_with_prometheus_client_on_the_bounds() -> None:
    for power in range(-20, 31):
        assert canonical_float(2.0**power) == float_to_go_string(2.0**power)


@given(st.floats(min_value=0, allow_infinity=False))
def test_canonical_float_reads_back(value: float) -> None:
    spelled = canonical_float(value)
    assert float(spelled) == value
    assert re.fullmatch(r"\d+\.\d+|\d(\.\d*[1-9])?e[+-]\d{2,3}", spelled)
    assert ("e" in spelled) == (value != 0 and not 1e-4 <= value < 1e6)


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_labels_must_be_as_many_as_declared(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        text([Family(COUNTER, [Series(labels, 1)])])


@pytest.mark.parametrize("value", [7, Distribution((1, 2), 3, 0.0), Distribution((1, 2, 3, 4), 5, 0.0)])
def test_buckets_must_be_as_many_as_declared(value: int | Distribution) -> None:
    with pytest.raises(ValueError, match=r"zip|unpack"):
        text([Family(HISTOGRAM, [Series(("sda",), value)])])


def test_surrogates_become_question_marks() -> None:
    broken = "a\udcff\ud800"
    page = openmetrics([Family(COUNTER, [Series((broken,), 1, exemplar=Exemplar((("comm", broken),), 1.0, NOW))])])
    assert page.splitlines()[-2] == 'events_total{kind="a??"} 1 # {comm="a??"} 1.0 1700000000.123'


# What is remembered


def test_labels_are_formatted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    first = renderer.render(PAGE, openmetrics=False)
    monkeypatch.setattr(exposition, "_escape", None)
    monkeypatch.setattr(exposition, "canonical_float", None)
    assert renderer.render(PAGE, openmetrics=False) == first
    equal = [Family(replace(family.metric), list(family.series)) for family in PAGE]
    assert renderer.render(equal, openmetrics=False) == first


def test_metric_declared_anew() -> None:
    renderer = Renderer()
    renderer.render(counter(None), openmetrics=False)
    anew = replace(COUNTER, labels=("sort",), help="Anew.")
    page = renderer.render([Family(anew, [Series(("a",), 2)])], openmetrics=False).decode()
    assert page == '# HELP events_total Anew.\n# TYPE events_total counter\nevents_total{sort="a"} 2\n'


def test_created_changes() -> None:
    renderer = Renderer()
    for created in (1.5, 1.5, 2.0):
        page = renderer.render([Family(COUNTER, [Series(("a",), 1, created)])], openmetrics=True).decode()
        assert f'events_created{{kind="a"}} {created}\n' in page


def test_series_that_left_the_page_are_forgotten() -> None:
    """Shown by their exemplars, which are forgotten too."""
    renderer = Renderer()
    page = counter(Exemplar((), 1.0, NOW))
    first = renderer.render(page, openmetrics=True)
    renderer.render([Family(COUNTER, [])], openmetrics=True, turn=2, since=1)
    assert renderer.render(page, openmetrics=True, turn=3, since=2) == first


def test_page_of_other_metrics_forgets_nothing() -> None:
    renderer = Renderer()
    page = counter(Exemplar((), 1.0, NOW))
    renderer.render(page, openmetrics=True)
    renderer.render([Family(GAUGE, [Series((), 1)])], openmetrics=True, turn=2, since=1)
    assert b" # " not in renderer.render(page, openmetrics=True, turn=3, since=2)


# Exemplars


def sent(renderer: Renderer, exemplar: Exemplar, turn: int, since: int, *, om: bool = True) -> bool:
    return b" # {" in renderer.render(counter(exemplar), om, turn=turn, since=since)


def test_exemplar_is_sent_once_to_who_was_there_before() -> None:
    renderer = Renderer()
    assert sent(renderer, Exemplar((), 1.0, NOW), 1, 0)
    assert not sent(renderer, Exemplar((), 1.0, NOW), 2, 1)
    assert not sent(renderer, Exemplar((), 2.0, NOW - 1), 3, 2)
    assert not sent(renderer, Exemplar((), 2.0, NOW + 0.0001), 4, 3), "the same millisecond"
    assert sent(renderer, Exemplar((), 2.0, NOW + 0.001), 5, 4)


def test_exemplar_is_sent_to_each_reader() -> None:
    """Two that come in turns: each names the turn of its own page before."""
    renderer = Renderer()
    exemplar = Exemplar((), 1.0, NOW)
    assert [sent(renderer, exemplar, turn, max(0, turn - 2)) for turn in range(5, 10)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not sent(renderer, Exemplar((), 2.0, NOW - 1), 10, 0), "never back in time"


def test_text_pages_consume_no_exemplar() -> None:
    renderer = Renderer()
    exemplar = Exemplar((), 1.0, NOW)
    assert not sent(renderer, exemplar, 1, 0, om=False)
    assert sent(renderer, exemplar, 2, 1)
    assert not sent(renderer, exemplar, 3, 2)


def test_buckets_have_exemplars_of_their_own() -> None:
    renderer = Renderer()
    turns = iter(range(1, 10))

    def exemplars(page: dict[int, Exemplar]) -> list[str]:
        families = [Family(HISTOGRAM, [Series(("sda",), Distribution((1, 2, 3), 4, 1.0, page))])]
        turn = next(turns)
        answer = renderer.render(families, openmetrics=True, turn=turn, since=turn - 1).decode()
        bounds = re.findall(r'le="(.*?)"} \d+ # ', answer)
        assert answer.count(" # {") == len(bounds)
        return bounds

    old, new = Exemplar((), 1.0, NOW), Exemplar((), 1.0, NOW + 1)
    assert exemplars({0: old, 3: new}) == ["9.5367431640625e-07", "+Inf"]
    assert exemplars({0: new, 1: old, 3: new}) == ["9.5367431640625e-07", "0.0009765625"]
    assert exemplars({-1: new, 4: new}) == [], "no such bucket"


@pytest.mark.parametrize("kind", ["gauge", "info"])
def test_no_exemplar_and_no_created_on_what_does_not_count(kind: MetricType) -> None:
    page = openmetrics([Family(Metric("x", kind, ""), [Series((), 1, NOW, Exemplar((), 1.0, NOW))])])
    assert " # " not in page
    assert "_created" not in page


@pytest.mark.parametrize("timestamp", [math.nan, math.inf, -math.inf, 1e306])
def test_exemplar_of_no_time_is_dropped(timestamp: float) -> None:
    assert not sent(Renderer(), Exemplar((), 1.0, timestamp), 1, 0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((), ""),
        ((("pid", "1"), ("comm", "a")), 'pid="1",comm="a"'),
        ((("a", "x" * 127),), 'a="' + "x" * 127 + '"'),
        ((("a", "\u00e9" * 127),), 'a="' + "\u00e9" * 127 + '"'),
        ((("a", '"' * 127),), 'a="' + '\\"' * 127 + '"'),
        ((("a", "x" * 128),), ""),
        ((("a", "x" * 100), ("b", "y" * 26)), 'a="' + "x" * 100 + '",b="' + "y" * 26 + '"'),
        ((("a", "x" * 100), ("b", "y" * 27)), 'a="' + "x" * 100 + '"'),
        ((("a", "x" * 100), ("b", "y" * 27), ("c", "z")), 'a="' + "x" * 100 + '"'),
        ((("0a", "1"), ("a-b", "2"), ("", "3"), ("\u00e9", "4"), ("a\n", "5"), ("_a0", "6")), '_a0="6"'),
        ((("a", "1"), ("a", "2")), 'a="1"'),
        ((("a", "\0}"),), 'a="\ufffd}"'),
    ],
)
def test_exemplar_labels(labels: tuple[tuple[str, str], ...], expected: str) -> None:
    line = openmetrics(counter(Exemplar(labels, 0.5, 1.0))).splitlines()[-2]
    assert line == f'events_total{{kind="a"}} 1 # {{{expected}}} 0.5 1.000'


# Whatever the families, the parsers read back what was rendered

ANYTHING = st.text(st.characters(exclude_categories=()))  # surrogates too
COUNT = st.integers(0, 2**64)
POSITIVE = st.floats(min_value=0)  # the parser refuses counters and sums that are negative or NaN, as the format does
TIME = st.floats(0, 4e9)


@st.composite
def exemplars(draw: st.DrawFn) -> Exemplar:
    # The reference parser misreads exemplars: 0.16 and 0.21 take the first } for the end of the labels, in a quoted
    # value too; 0.26 takes an escaped quote for the end of the value. Prometheus reads both.
    values = st.text(st.characters(exclude_categories=(), exclude_characters='}"'))
    names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]*", fullmatch=True) | ANYTHING
    labels = draw(st.lists(st.tuples(names, values), max_size=4))
    return Exemplar(tuple(labels), draw(st.floats(allow_nan=False)), draw(TIME))


def distributions(bounds: int) -> st.SearchStrategy[Distribution]:
    return st.builds(
        lambda counts, total, page: Distribution(tuple(sorted(counts)[:-1]), max(counts), total, page),
        st.lists(COUNT, min_size=bounds + 1, max_size=bounds + 1),
        POSITIVE,
        st.dictionaries(st.integers(0, bounds), exemplars()),
    )


@st.composite
def families(draw: st.DrawFn, name: str) -> Family:
    kind: MetricType = draw(st.sampled_from(["counter", "gauge", "histogram", "info"]))
    labels = draw(st.sampled_from([(), ("a",), ("b", "_c9")]))
    unit = "" if kind == "info" else draw(st.sampled_from(["", "seconds"]))
    bounds = st.lists(st.floats(min_value=0, allow_infinity=False), unique=True, max_size=4).map(sorted)
    metric = Metric(
        name=f"{name}_{unit}" if unit else name,
        type=kind,
        help=draw(ANYTHING),
        labels=labels,
        unit=unit,
        bounds=tuple(draw(bounds)) if kind == "histogram" else (),
    )
    value = {
        "counter": COUNT | POSITIVE,
        "gauge": st.integers(-(2**64), 2**64) | st.floats(),
        "histogram": distributions(len(metric.bounds)),
        "info": st.just(1),
    }[kind]
    series = st.builds(Series, st.tuples(*[ANYTHING] * len(labels)), value, st.none() | TIME, st.none() | exemplars())
    page = st.lists(series, max_size=3, unique_by=lambda one: tuple(map(readable, one.labels)))
    return Family(metric, draw(page))


PAGES = st.integers(0, 3).flatmap(lambda count: st.tuples(*(families(f"m{number}") for number in range(count))))


def readable(value: str) -> str:
    return value.encode(errors="replace").decode()


Sample = tuple[str, dict[str, str], float]


def samples(family: Family, *, om: bool) -> list[tuple[Sample, Exemplar | None]]:
    """What a parser must find, in order."""
    metric = family.metric
    found: list[tuple[Sample, Exemplar | None]] = []
    for one in family.series:
        labels = dict(zip(metric.labels, map(readable, one.labels), strict=True))
        if isinstance(one.value, Distribution):
            buckets = zip((*metric.bounds, math.inf), (*one.value.cumulative, one.value.count), strict=True)
            for slot, (bound, count) in enumerate(buckets):
                sample = (f"{metric.name}_bucket", {**labels, "le": canonical_float(bound)}, count)
                found.append((sample, one.value.exemplars.get(slot)))
            found.append(((f"{metric.name}_count", labels, one.value.count), None))
            found.append(((f"{metric.name}_sum", labels, one.value.sum), None))
        else:
            suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
            found.append(((metric.name + suffix, labels, one.value), one.exemplar if suffix == "_total" else None))
        if om and one.created is not None and metric.type in ("counter", "histogram"):
            found.append(((f"{metric.name}_created", labels, one.created), None))
    return found


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@given(PAGES)
def test_openmetrics_reads_back(page: Sequence[Family]) -> None:
    parsed = list(parse_openmetrics(openmetrics(page)))
    assert len(parsed) == len(page)
    for family, got in zip(page, parsed, strict=True):
        metric = family.metric
        assert (got.name, got.type, got.unit) == (metric.name, metric.type, metric.unit)
        assert got.documentation.strip() == readable(metric.help).strip(), "0.26 strips blanks"
        expected = samples(family, om=True)
        assert [(s.name, s.labels) for s in got.samples] == [(name, labels) for (name, labels, _), _ in expected]
        for sample, ((_, _, value), exemplar) in zip(got.samples, expected, strict=True):
            assert same(sample.value, value)
            assert (sample.exemplar is None) == (exemplar is None)
            if sample.exemplar is not None and exemplar is not None:
                kept = sample.exemplar.labels
                assert kept.items() <= {(name, nul_free(value)) for name, value in exemplar.labels}
                assert sum(map(len, (*kept, *kept.values()))) <= 128
                assert sample.exemplar.value == exemplar.value
                assert float(sample.exemplar.timestamp or 0) == pytest.approx(exemplar.timestamp, abs=0.001)


def nul_free(value: str) -> str:
    return readable(value).replace("\0", "\ufffd")


@given(PAGES)
def test_text_reads_back(page: Sequence[Family]) -> None:
    parsed = list(parse_text(text(page)))
    assert len(parsed) == len(page)
    for family, got in zip(page, parsed, strict=True):
        metric, info = family.metric, family.metric.type == "info"
        assert got.name == (f"{metric.name}_info" if info else metric.name)
        assert got.type == ("gauge" if info else metric.type)
        assert got.documentation.strip() == readable(metric.help).strip(), "every version strips blanks"
        expected = [sample for sample, _ in samples(family, om=False)]
        assert [(s.name, s.labels) for s in got.samples] == [(name, labels) for name, labels, _ in expected]
        for sample, (_, _, value) in zip(got.samples, expected, strict=True):
            assert same(float(sample.value), float(value))
