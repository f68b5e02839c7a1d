# SPDX-License-Identifier: Apache-2.0
"""From `server.listen` to listening sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from importlib import import_module

from daemon.config import Listen
from daemon.errors import BpfmetricsdError

BACKLOG = 128

_FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_REMEDIES = {
    errno.EADDRINUSE: "stop the program that uses it, or change server.listen",
    errno.EADDRNOTAVAIL: "no interface has this address: change server.listen, or start when the network is up",
    errno.EACCES: "start as root, give the service CAP_NET_BIND_SERVICE, or choose a port above 1023",
    errno.EAFNOSUPPORT: "this kernel lacks the protocol: listen on an IPv4 address",
}


def open_sockets(listen: Sequence[Listen]) -> list[socket.socket]:
    """Sockets that already listen, none of them inherited by children. BpfmetricsdError: one cannot be opened."""
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for item in listen:
            for sock in _passed() if item.fd else _open(item):
                opened.callback(sock.close)
                sockets.append(sock)
        opened.pop_all()
    return sockets


def url(sock: socket.socket, tls: bool) -> str:
    """Where a client finds the socket."""
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if tls else 'http'}://{host}:{address[1]}"


def _open(item: Listen) -> list[socket.socket]:
    """One socket for each address of the host; `localhost` has two, and one of them may be missing."""
    if not item.host:
        return [_open_everywhere(item)]
    try:
        found = socket.getaddrinfo(item.host, item.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BpfmetricsdError(
            f"cannot listen on {item}: {reason}; write an address of this machine in server.listen"
        ) from None
    sockets, failures = [], []
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            sockets.append(_bind(family, address))
        except OSError as error:
            failures.append(error)
    fatal = [error for error in failures if not sockets or error.errno not in _NO_IPV6]
    if fatal:
        for sock in sockets:
            sock.close()
        raise _failure(item, fatal[0])
    return sockets


def _open_everywhere(item: Listen) -> socket.socket:
    """One socket for IPv6 and IPv4, or for IPv4 where there is no IPv6."""
    try:
        return _bind(socket.AF_INET6, ("::", item.port), v6only=False)
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise _failure(item, error) from None
    try:
        return _bind(socket.AF_INET, ("", item.port))
    except OSError as error:
        raise _failure(item, error) from None


def _bind(family: int, address: tuple[object, ...], v6only: bool = True) -> socket.socket:
    """`[::]:PORT` takes IPv6 only, so that it can stand beside `0.0.0.0:PORT`."""
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio looks, and sets TCP_NODELAY
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind(address)
        sock.listen(BACKLOG)  # here, because an address in use may show only now
    except BaseException:
        sock.close()
        raise
    return sock


def _failure(item: Listen, error: OSError) -> BpfmetricsdError:
    remedy = _REMEDIES.get(error.errno or 0, "change server.listen")
    return BpfmetricsdError(f"cannot listen on {item}: {error.strerror}; {remedy}")


def _passed() -> list[socket.socket]:
    """The sockets that systemd passed (LISTEN_FDS)."""
    sockets = [socket.socket(fileno=number) for number in _passed_fds()]
    for sock in sockets:
        sock.set_inheritable(False)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BpfmetricsdError(
                f"cannot listen on fd://: file descriptor {sock.fileno()} is no listening stream socket;"
                " use ListenStream= in the socket unit"
            )
    if not sockets:
        raise BpfmetricsdError(
            "cannot listen on fd://: systemd passed no socket; start the socket unit, or write ADDRESS:PORT"
        )
    return sockets


def _passed_fds() -> list[int]:
    """What sd_listen_fds(3) returns; the variables go, so that no child takes the sockets for its own."""
    try:
        fds = list(import_module("systemd.daemon").listen_fds(unset_environment=False))
    except ImportError:
        count = os.environ.get("LISTEN_FDS", "")
        own = os.environ.get("LISTEN_PID") == str(os.getpid()) and count.isascii() and count.isdigit()
        fds = list(range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count))) if own else []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # listen_fds would leave them in os.environ
        os.environ.pop(name, None)
    return fds
