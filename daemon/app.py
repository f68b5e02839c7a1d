# SPDX-License-Identifier: Apache-2.0
"""What each path answers, as an ASGI application without a framework."""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl

from daemon.exposition import Renderer
from daemon.look import POLICY
from daemon.model import Family
from daemon.negotiation import accepts_gzip, content_type, negotiate

if TYPE_CHECKING:
    from daemon.webconfig import WebConfig

SHARE_SECONDS = 0.25  # scrapes that arrive within it get the same snapshot
MAX_READERS = 64
MAX_PAGES = 4  # kept of one moment: two formats, and readers that were here at different times before
CHUNK_BYTES = 1 << 16  # a slow client keeps no more than this in our memory

Headers = dict[bytes, bytes]

logger = logging.getLogger("bpfmetricsd.app")


class Source(Protocol):
    """What the server serves. `collect` never raises for one collector's failure; `tick` and `reload` return a line."""

    def names(self) -> frozenset[str]: ...
    def collect(self, names: frozenset[str] | None) -> list[Family]: ...
    def ready(self) -> list[str]: ...
    def status(self) -> dict[str, Any]: ...
    def page(self) -> str: ...
    def tick(self) -> str: ...
    def reload(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Request:
    head: bool
    query: bytes
    headers: Headers
    host: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    headers: Headers


def _line(status: int, text: str, headers: Headers | None = None) -> Answer:
    return Answer(status, f"{text}\n".encode(), {b"content-type": b"text/plain; charset=utf-8", **(headers or {})})


class Snapshot:
    """One reading of the collectors, and each page made of it. `turn` grows from one reading to the next."""

    def __init__(self, families: Sequence[Family], turn: int) -> None:
        self.turn = turn
        self._families = families
        self._pages: dict[tuple[bool, int], bytes] = {}
        self._zipped: dict[tuple[bool, int], bytes] = {}

    def page(self, renderer: Renderer, openmetrics: bool, gzip: bool, since: int) -> bytes:
        key = (openmetrics, since if openmetrics else 0)
        if key not in self._pages:
            if len(self._pages) == MAX_PAGES:
                self._pages.clear()
                self._zipped.clear()
            self._pages[key] = renderer.render(self._families, openmetrics, turn=self.turn, since=since)
        if not gzip:
            return self._pages[key]
        if key not in self._zipped:
            self._zipped[key] = zlib.compress(self._pages[key], 1, wbits=31)
        return self._zipped[key]


class Readers:
    """Who was served which turn, so that each gets each exemplar once: both servers of a pair, and who looks with curl.

    A reader is known by its address, its User-Agent and what it collects. Of more than MAX_READERS the one that has
    not come for the longest time is forgotten, and gets exemplars again that it may have.
    """

    def __init__(self) -> None:
        self._turns: dict[object, tuple[int, int]] = {}  # the last turn, and the one before

    def since(self, reader: object, turn: int, head: bool) -> int:
        """The turn after which exemplars are new to the reader; the same for the same page. HEAD takes nothing."""
        last, before = self._turns.get(reader, (0, 0))
        since = before if last == turn else last
        if not head:
            self._turns.pop(reader, None)
            self._turns[reader] = turn, since
            if len(self._turns) > MAX_READERS:
                del self._turns[next(iter(self._turns))]
        return since


class App:
    """The ASGI application. A snapshot stays for SHARE_SECONDS: scrapes of that moment share it, and so do people."""

    def __init__(self, source: Source, web: WebConfig | None) -> None:
        self._source = source
        self._web = web
        self._renderer = Renderer()
        self._text: bytes | None = None  # of the page for people
        self._readers = Readers()
        self._turn = 0
        self._snapshots: dict[frozenset[str] | None, Snapshot] = {}
        self._routes: dict[str, Callable[[Request], Answer]] = {
            "/": self._page,
            "/metrics": self._metrics,
            "/status": self._status,
            "/-/healthy": lambda _: _line(200, "healthy"),
            "/-/ready": self._ready,
        }

    async def __call__(self, scope: dict[str, Any], _receive: object, send: Callable[..., Awaitable[None]]) -> None:
        request = Request(
            scope["method"] == "HEAD",
            scope["query_string"],
            _combined(scope["headers"]),
            (scope.get("client") or ("",))[0],
        )
        answer = await self._answer(scope["method"], scope["path"], request)
        headers = {
            b"date": formatdate(usegmt=True).encode(),
            b"content-length": str(len(answer.body)).encode(),
            b"cache-control": b"no-store",
            b"x-content-type-options": b"nosniff",
            **answer.headers,
            **(self._web.headers if self._web else {}),
        }
        await send({"type": "http.response.start", "status": answer.status, "headers": list(headers.items())})
        body = memoryview(b"" if request.head else answer.body)
        while len(body) > CHUNK_BYTES:
            await send({"type": "http.response.body", "body": body[:CHUNK_BYTES], "more_body": True})
            body = body[CHUNK_BYTES:]
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, method: str, path: str, request: Request) -> Answer:
        if self._web:
            status = await self._web.authorize(request.headers.get(b"authorization"))
            if status == 503:
                return _line(503, "too many passwords wait to be checked; try again", {b"retry-after": b"5"})
            if status != 200:
                challenge = b'Basic realm="bpfmetricsd", charset="UTF-8"'
                return _line(401, "a user and a password are needed", {b"www-authenticate": challenge})
        if method not in ("GET", "HEAD"):
            return _line(405, "only GET and HEAD are answered here", {b"allow": b"GET, HEAD"})
        route = self._routes.get(path)
        if route is None:
            return _line(404, f"nothing is here; there are {', '.join(self._routes)}")
        try:
            return route(request)
        except Exception:
            logger.exception("cannot answer %s", path)
            return _line(500, "this answer failed; the service's log says why")

    def _page(self, _: Request) -> Answer:
        headers = {
            b"content-type": b"text/html; charset=utf-8",
            b"content-security-policy": POLICY.encode(),
            b"referrer-policy": b"no-referrer",
        }
        if self._text is None:
            self._text = self._source.page().encode(errors="replace")
            asyncio.get_running_loop().call_later(SHARE_SECONDS, self._forget)
        return Answer(200, self._text, headers)

    def _forget(self) -> None:
        self._text = None

    def _metrics(self, request: Request) -> Answer:
        query = parse_qsl(request.query.decode("latin-1"), keep_blank_values=True)
        names = frozenset(value for key, value in query if key == "collect[]")
        known = self._source.names()
        if not names <= known:
            unknown = ", ".join(ascii(name) for name in sorted(names - known))
            return _line(400, f"collect[] names {unknown}; there are {', '.join(sorted(known)) or 'no collectors'}")
        openmetrics = negotiate(_text(request.headers, b"accept"))
        gzip = accepts_gzip(_text(request.headers, b"accept-encoding"))
        snapshot = self._snapshot(names or None)
        reader = request.host, request.headers.get(b"user-agent"), names
        since = self._readers.since(reader, snapshot.turn, request.head) if openmetrics else 0
        page = snapshot.page(self._renderer, openmetrics, gzip, since)
        headers = {b"content-type": content_type(openmetrics).encode(), b"vary": b"Accept, Accept-Encoding"}
        return Answer(200, page, {**headers, **({b"content-encoding": b"gzip"} if gzip else {})})

    def _snapshot(self, names: frozenset[str] | None) -> Snapshot:
        found = self._snapshots.get(names)
        if found is None:
            self._turn += 1
            found = self._snapshots[names] = Snapshot(self._source.collect(names), self._turn)
            asyncio.get_running_loop().call_later(SHARE_SECONDS, self._snapshots.pop, names)
        return found

    def _ready(self, _: Request) -> Answer:
        reasons = [" ".join(reason.split()) for reason in self._source.ready()]
        return _line(503, "\n".join(reasons)) if reasons else _line(200, "ready")

    def _status(self, _: Request) -> Answer:
        body = json.dumps(self._source.status(), indent=2).encode() + b"\n"
        return Answer(200, body, {b"content-type": b"application/json"})


def _combined(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Headers given more than once mean their list (RFC 9110, 5.3)."""
    combined: Headers = {}
    for name, value in headers:
        combined[name] = combined[name] + b", " + value if name in combined else value
    return combined


def _text(headers: Headers, name: bytes) -> str | None:
    return headers[name].decode("latin-1") if name in headers else None
