# SPDX-License-Identifier: Apache-2.0
"""Which format and which encoding a client asked for (RFC 9110, 12.4 and 12.5). Nothing here raises on a bad header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# What a client can name, and how closely it describes what we would send; the closest one's q counts.
_Closeness = Mapping[tuple[str, str | None], int]
_OPENMETRICS: _Closeness = {
    ("application/openmetrics-text", "1.0.0"): 3,
    ("application/openmetrics-text", None): 2,
    ("application/openmetrics-text", "0.0.1"): 1,
}
_TEXT: _Closeness = {("text/plain", "0.0.4"): 4, ("text/plain", None): 3, ("text/*", None): 2, ("*/*", None): 1}
_GZIP: _Closeness = {("gzip", None): 2, ("x-gzip", None): 2, ("*", None): 1}
_IDENTITY: _Closeness = {("identity", None): 1}

_QUALITY = re.compile(r"0?\.[0-9]+|0\.?|1(\.0*)?")
_QUOTED = r'"(?:[^"\\]|\\.)*"?'
_ITEM = re.compile(rf'(?:[^,"]|{_QUOTED})+')
_PARAMETER = re.compile(rf'(?:[^;"]|{_QUOTED})+')

_Range = tuple[str, str | None, float]


def negotiate(accept: str | None) -> bool:
    """Whether to answer in OpenMetrics 1.0: only to a client that names it (1.0.0, 0.0.1 or no version) and does not
    prefer text. All others get text 0.0.4, also one that takes neither, for a scrape must get an answer.
    """
    ranges = [("*/*" if name == "*" else name, version, q) for name, version, q in _ranges(accept)]
    openmetrics = _quality(ranges, _OPENMETRICS)
    return openmetrics > 0 and openmetrics >= _quality(ranges, _TEXT)


def content_type(openmetrics: bool) -> str:
    return OPENMETRICS_CONTENT_TYPE if openmetrics else TEXT_CONTENT_TYPE


def accepts_gzip(accept_encoding: str | None) -> bool:
    """Whether the client takes gzip and does not prefer `identity`. A client that says nothing gets no gzip."""
    ranges = list(_ranges(accept_encoding))
    gzip = _quality(ranges, _GZIP)
    return gzip > 0 and gzip >= _quality(ranges, _IDENTITY)


def _quality(ranges: Iterable[_Range], closeness: _Closeness) -> float:
    matches = ((closeness.get((name, version), 0), q) for name, version, q in ranges)
    close, q = max(matches, default=(0, 0.0))
    return q if close else 0.0


def _ranges(header: str | None) -> Iterator[_Range]:
    """Each element of the header as name, version and q; one whose q is no number from 0 to 1 is left out."""
    for item in _ITEM.findall(header or ""):
        name, _, rest = item.partition(";")
        parameters = dict(_parameter(text) for text in _PARAMETER.findall(rest))
        q = parameters.get("q", "1")
        if _QUALITY.fullmatch(q):
            yield name.strip().lower(), parameters.get("version") or None, float(q)


def _parameter(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    value = value.strip()
    if value.startswith('"'):
        value = re.sub(r"\\(.)", r"\1", value.strip('"'))
    return key.strip().lower(), value
