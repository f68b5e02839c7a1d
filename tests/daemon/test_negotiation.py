# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.negotiation import accepts_gzip, content_type, negotiate

OM = "application/openmetrics-text"


@pytest.mark.parametrize(
    "accept",
    [
        OM,
        f"{OM};version=1.0.0",
        f"{OM};version=0.0.1",
        f"{OM}; version=1.0.0; charset=utf-8",
        f'{OM};version="1.0.0"',
        f"{OM};version=",
        f"{OM.upper()} ; VERSION=1.0.0 ; Q=0.5",
        f"{OM};q=0.001",
        f"{OM};q=1.000",
        # Prometheus 2.42 and 3.5, as they send it
        f"{OM};version=1.0.0,{OM};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        (
            f"{OM};version=1.0.0;escaping=allow-utf-8;q=0.6,{OM};version=0.0.1;q=0.5,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        ),
        # with native histograms Prometheus prefers protobuf, which is not here
        (
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,"
            f"{OM};version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        ),
        # equal quality: OpenMetrics is named
        f"text/plain,{OM}",
        f"text/plain;version=0.0.4;q=0.5,{OM};q=0.5",
        f"*/*,{OM}",
        # the closest range decides for each format
        f"{OM};version=1.0.0;q=0.6,{OM};q=0,text/plain;q=0.5",
        f"text/plain;q=0.1,{OM};q=0.2,*/*;q=0.9",
        f"text/plain;version=0.0.4;q=0.1,text/plain;q=0.9,{OM};q=0.2",
        f"text/plain;q=0,{OM};q=0.1",
        # text in a version that is not here does not count
        f"text/plain;version=1.0.0,{OM};q=0.1",
        # what cannot be read is left out, the rest counts
        f"text/plain;q=1.1,{OM};q=0.1",
        f"text/plain;q=high,{OM};q=0.1",
        f",,;;q=,/,{OM};;q=0.1,",
        f'text/html;title="a,{OM};q=0;\\"",{OM}',
        f"{OM};q=.5",
        f"{OM} ; q = 0.5",
    ],
)
def test_openmetrics(accept: str) -> None:
    assert negotiate(accept)


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "",
        " ",
        "*/*",
        "*",
        "text/*",
        "text/plain",
        "text/plain;version=0.0.4",
        "text/plain;version=0.0.4;q=1,*/*;q=0.1",
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
        "application/json",
        # OpenMetrics is not named
        "application/*",
        "application/openmetrics",
        # named, but refused, or in another version
        f"{OM};q=0",
        f"{OM};Q=0",
        f"{OM};VERSION=2.0.0",
        f"{OM};q=0.000,text/plain",
        f"{OM};version=2.0.0",
        f"{OM};version=1.0",
        f"{OM};version=1.0.0;q=0,{OM};version=0.0.1;q=0.5",
        f"{OM};version=1.0.0;q=0,*/*",
        # text is preferred
        f"{OM};q=0.5,text/plain",
        f"{OM};q=0.5,text/plain;version=0.0.4;q=0.501",
        f"{OM};q=0.5,text/*;q=0.6",
        f"{OM};q=0.5,*/*",
        f"{OM};q=0.5,*",
        f"{OM};version=1.0.0;q=0.1,{OM};version=0.0.1;q=0.9,text/plain;q=0.5",
        # what cannot be read is left out
        f"{OM};q=",
        f"{OM};q=-1",
        f"{OM};q=2",
        f"{OM};q=nan",
        f"{OM};q=1e-1",
        f"{OM};q=\u0661",
        f'"{OM}',
        f'text/html;title="{OM},{OM}',
        f"{OM} text/plain",
    ],
)
def test_text(accept: str | None) -> None:
    assert not negotiate(accept)


def test_content_type() -> None:
    assert content_type(openmetrics=True) == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert content_type(openmetrics=False) == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    "accept_encoding",
    [
        "gzip",
        "GZIP",
        "x-gzip",
        "gzip;q=0.001",
        "deflate, gzip;q=1.0, *;q=0.5",
        "br, zstd, gzip",
        "*",
        "*;q=0.1",
        "identity;q=0.5, gzip",
        "identity;q=0.5, gzip;q=0.5",
        "gzip, *;q=0",
        "identity;q=0, *;q=0.1",
    ],
)
def test_gzip(accept_encoding: str) -> None:
    assert accepts_gzip(accept_encoding)


@pytest.mark.parametrize(
    "accept_encoding",
    [
        None,
        "",
        "identity",
        "deflate, br",
        "gzip;q=0",
        "gzip;q=0.0",
        "gzip;q=0, *",
        "*;q=0",
        "identity, gzip;q=0.5",
        "identity, *;q=0.5",
        "gzip;q=nonsense",
        "gzipped",
    ],
)
def test_no_gzip(accept_encoding: str | None) -> None:
    assert not accepts_gzip(accept_encoding)


# Text of the characters and words that a header is made of finds more than text of any characters.
WORDS = ["text/plain", OM, "*/*", "gzip", "identity", "*", "q", "version", "1.0.0", "0", "1", ".", *'/;,="\\ \t\n']


@given(st.text() | st.lists(st.sampled_from(WORDS)).map("".join))
def test_no_header_raises(header: str) -> None:
    assert not negotiate(header) or OM in header.lower()
    assert not accepts_gzip(header) or "gzip" in header.lower() or "*" in header


NAMES = st.sampled_from([OM, f"{OM};version=1.0.0", f"{OM};version=0.0.1", "text/plain", "text/*", "*/*"])
QUALITIES = st.sampled_from(["", ";q=0", ";q=0.1", ";q=0.5", ";q=1"])


@given(st.lists(st.tuples(NAMES, QUALITIES).map("".join), max_size=6))
def test_order_does_not_matter(ranges: list[str]) -> None:
    assert negotiate(",".join(reversed(ranges))) == negotiate(", ".join(sorted(ranges))) == negotiate(",".join(ranges))
