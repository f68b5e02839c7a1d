# SPDX-License-Identifier: Apache-2.0
"""The data model between the kernel's maps and the text of `/metrics`.

A collector declares its `Metric`s once; `decode` returns a `Family` for each of them. Values are in base units
(seconds, bytes) here: conversion happened in `daemon.histogram`, at the border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MetricType = Literal["counter", "gauge", "histogram", "info"]

# OpenMetrics 1.0: the label names and values of one exemplar hold at most 128 UTF-8 characters together.
EXEMPLAR_LABELS_MAX = 128


@dataclass(frozen=True, slots=True)
class Metric:
    """What never changes about a metric.

    `name` is the family's name: without `_total` on a counter, `_info` on an info, `_bucket` on a histogram.
    `unit` is empty or the name's last word. `bounds` are a histogram's inclusive upper bounds in the base
    unit, ascending, without +Inf.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One real event behind a bucket or a counter; `timestamp` in seconds since the epoch."""

    labels: tuple[tuple[str, str], ...]
    value: float
    timestamp: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram's value.

    `cumulative[i]` counts events at or below `Metric.bounds[i]`; `count` is `+Inf`. `exemplars` are keyed by
    the index of the bucket that their value falls into, where `len(bounds)` is `+Inf`.
    """

    cumulative: tuple[int, ...]
    count: int
    sum: float
    exemplars: Mapping[int, Exemplar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Series:
    """One label set. `labels` are values in the order of `Metric.labels`; `created` in seconds since the epoch."""

    labels: tuple[str, ...]
    value: int | float | Distribution
    created: float | None = None
    exemplar: Exemplar | None = None


@dataclass(frozen=True, slots=True)
class Family:
    metric: Metric
    series: Sequence[Series]
