# SPDX-License-Identifier: Apache-2.0
"""The HTTP server and the work between scrapes, in one thread and one event loop.

uvicorn supplies the protocol, and nothing else of it runs: its `Server` would wake ten times a second, take the
signals and wait without end for slow clients. Reading maps and rendering are short and happen in the loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import inspect
import logging
import signal
import socket
import sys
import threading
from asyncio.sslproto import SSLProtocol
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import h11

from daemon import lean
from daemon.app import App, Source
from daemon.errors import BpfmetricsdError
from daemon.listening import url

if TYPE_CHECKING:
    from daemon.webconfig import WebConfig

REQUEST_SECONDS = 10  # to send a whole request
ANSWER_SECONDS = 30  # to take the answer
IDLE_SECONDS = 75  # between two requests; Prometheus scrapes every 15 to 60 seconds
STOP_SECONDS = 1  # for answers under way when the service stops
MAX_CONNECTIONS = 256
MISSED_TICKS = 3  # after so many intervals without a good tick the watchdog is no longer fed

_MALLOC = ((-8, 1), (-3, 1 << 17), (-1, 1 << 17))  # M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3)

logger = logging.getLogger("bpfmetricsd.server")


def _h11_protocol() -> Any:
    """uvicorn's protocol class; Any, because its types differ between versions.

    The package's own `__init__` is not run, as it imports a command line and a supervisor of processes (2 MB).
    """
    if "uvicorn" not in sys.modules:
        lean.bare("uvicorn", "python3-uvicorn")  # stays, for uvicorn imports more of itself while it runs
        vars(sys.modules["uvicorn"])["Config"] = importlib.import_module("uvicorn.config").Config  # it asks for it
    return importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol


H11Protocol: Any = _h11_protocol()
# Named here because once the service's user serves, the folders of modules may be closed to it.
ServerState: Any = importlib.import_module("uvicorn.server").ServerState
Config: Any = importlib.import_module("uvicorn.config").Config
importlib.import_module("uvicorn.lifespan.off")


class Notify(Protocol):
    """`daemon.notify.Notifier`."""

    @property
    def watchdog_interval(self) -> float | None: ...
    def ready(self, status: str = "") -> None: ...
    def status(self, line: str) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self) -> None: ...
    def watchdog(self) -> None: ...


class Connection(H11Protocol):  # type: ignore[misc]  # its base is Any
    """One client. It is cut off when it takes too long for its request or for our answer, which uvicorn does not do.

    Of more than MAX_CONNECTIONS the one goes that has owed a request for the longest time.
    """

    _seconds = 0.0
    _began = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._limit(REQUEST_SECONDS)
        if len(self.connections) > MAX_CONNECTIONS:
            idle = (connection for connection in self.connections if not connection.answering())
            oldest = min(idle, key=lambda connection: connection._began)
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit(ANSWER_SECONDS if self.answering() else REQUEST_SECONDS)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._limit(ANSWER_SECONDS if self.answering() else IDLE_SECONDS + REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._timer:
            self._timer.cancel()

    def handle_upgrade(self, _: object) -> None:
        """Old versions of uvicorn look for a WebSocket library here; new ones ignore the wish to upgrade."""
        self.send_400_response("there is nothing to upgrade to; ask in HTTP/1.1\n")

    def answering(self) -> bool:
        """Whether the request is complete and its answer is not."""
        return bool(self.cycle and not self.cycle.response_complete and self.conn.their_state is not h11.SEND_BODY)

    def _limit(self, seconds: float) -> None:
        """The connection may stay as it is for so long; the clock runs on while it does."""
        if seconds == self._seconds:
            return
        if self._timer:
            self._timer.cancel()
        self._seconds, self._began = seconds, self.loop.time()
        self._timer = self.loop.call_later(seconds, self.transport.abort)


@dataclass
class Server:
    source: Source
    sockets: Sequence[socket.socket]
    interval: float
    notify: Notify
    web: WebConfig | None = None
    connections: set[Connection] = field(default_factory=set, init=False)
    _complaint: str = field(default="", init=False)
    _failure: str = field(default="", init=False)
    _last_tick: float = field(default=0.0, init=False)

    async def run(self) -> None:
        """Serve until `stop`."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._last_tick = self._loop.time()
        servers = await self._listen()
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGTERM, self.stop)
            self._loop.add_signal_handler(signal.SIGINT, self.stop)
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        for sock in self.sockets:
            print(f"listening on {url(sock, bool(self.web and self.web.context))}", flush=True)
        self.notify.ready(self._tick())
        tasks = [self._loop.create_task(task) for task in self._tasks()]
        await self._stop.wait()
        self.notify.stopping()
        for task in tasks:
            task.cancel()
        for server in servers:
            server.close()
        await self._disconnect()
        for server in servers:  # TLS handshakes; before Python 3.13 they end with the process
            getattr(server, "abort_clients", lambda: None)()
        await asyncio.sleep(0)  # what was aborted closes in the next round of the loop

    def stop(self) -> None:
        self._stop.set()

    def reload(self) -> None:
        """A bad configuration leaves the old one in force, and the status says so until a good one comes."""
        self.notify.reloading()
        self._complaint = ""
        try:
            if self.web:
                self.web.renew()
            line = self.source.reload()
        except Exception as error:
            _log("configuration not read again", error)
            line = self._complaint = f"configuration not read again: {error}"
        self.notify.ready(line)

    async def _listen(self) -> list[asyncio.Server]:
        config = Config(
            App(self.source, self.web),
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # others log what any client can cause
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
        )
        config.load()
        state = ServerState()
        # Newer versions want the state of the lifespan protocol, which is off.
        newer = "app_state" in inspect.signature(H11Protocol).parameters
        arguments = {"config": config, "server_state": state, **({"app_state": {}} if newer else {})}
        context = self.web.context if self.web else None
        self.connections = state.connections
        if context:
            SSLProtocol.max_size = 1 << 14  # bytes of a record; each connection would hold 256 KiB
        return [
            await self._loop.create_server(
                lambda: Connection(**arguments),
                sock=sock,
                ssl=context,
                ssl_handshake_timeout=REQUEST_SECONDS if context else None,
                ssl_shutdown_timeout=STOP_SECONDS if context else None,
            )
            for sock in self.sockets
        ]

    async def _disconnect(self) -> None:
        """Answers under way get STOP_SECONDS."""
        for connection in list(self.connections):
            if connection.answering():
                connection.shutdown()
            else:
                connection.transport.abort()
        for _ in range(50):
            if self.connections:
                await asyncio.sleep(STOP_SECONDS / 50)
        for connection in list(self.connections):
            connection.transport.abort()

    def _tasks(self) -> list[Coroutine[Any, Any, None]]:
        tasks = [self._tick_every_interval()]
        if self.notify.watchdog_interval:
            tasks.append(self._feed_watchdog(self.notify.watchdog_interval))
        return tasks

    async def _tick_every_interval(self) -> None:
        due = self._loop.time()
        while True:
            late = self._loop.time() - due
            due += self.interval * (1 + late // self.interval)
            await asyncio.sleep(due - self._loop.time())
            if line := self._tick():
                self.notify.status(line)

    def _tick(self) -> str:
        """The line that says how all is; empty when the work failed."""
        try:
            line = self.source.tick()
        except Exception as error:
            if repr(error) != self._failure:  # not every few seconds
                self._failure = repr(error)
                _log("periodic work failed", error)
            return ""
        self._failure = ""
        self._last_tick = self._loop.time()
        return f"{line}; {self._complaint}" if self._complaint else line

    async def _feed_watchdog(self, every: float) -> None:
        patience = max(MISSED_TICKS * self.interval, 2 * every)
        while True:
            if self._loop.time() - self._last_tick <= patience:
                self.notify.watchdog()
            await asyncio.sleep(every)


def serve(
    source: Source, sockets: Sequence[socket.socket], interval: float, notify: Notify, web: WebConfig | None = None
) -> None:
    """Serve `sockets` until SIGTERM or SIGINT; SIGHUP reloads. `interval` is in seconds."""
    _save_memory()
    asyncio.run(Server(source, sockets, interval, notify, web).run())


def _log(what: str, error: Exception) -> None:
    """What a person can mend takes a line; a bug shows its traceback."""
    logger.log(logging.ERROR, "%s: %s", what, error, exc_info=not isinstance(error, BpfmetricsdError))


def _save_memory() -> None:
    """Blocks of the size of a page of metrics come from mmap and go back to the kernel, and no thread gets an arena."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for parameter, value in _MALLOC:
            libc.mallopt(parameter, value)
    gc.collect()
    gc.freeze()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
