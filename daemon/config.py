# SPDX-License-Identifier: Apache-2.0
"""The configuration file: YAML in, a checked `Config` out, or every fault in the file at once."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from daemon.declare import Option
from daemon.errors import UsageError
from daemon.fields import (
    Faults,
    Field,
    Fields,
    compose,
    empty_mapping,
    kind_of,
    quote,
    read_bool,
    read_choice,
    read_duration,
    read_int,
    read_items,
    read_mapping,
    read_path,
)

MAX_FILE_BYTES = 1 << 20
MAX_LISTEN = 16
_BRACKETED = re.compile(r"\[[0-9A-Fa-f:.]+(?:%[\w.-]{1,15})?\]", re.ASCII)
_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LISTEN = 'write ADDRESS:PORT such as 127.0.0.1:10435 or "[::1]:10435", ":10435" for all addresses, or fd://'


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen. An empty `host` is all addresses; `fd` is a socket that systemd hands over."""

    host: str = ""
    port: int = 0
    fd: bool = False

    def __str__(self) -> str:
        if self.fd:
            return "fd://"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    listen: tuple[Listen, ...] = (Listen("127.0.0.1", 10435),)
    web_config: Path | None = None


@dataclass(frozen=True, slots=True)
class CollectorConfig:
    """`options` holds a value for each option that the collector declares. `exemplar_interval` is in seconds."""

    options: Mapping[str, Any] = field(default_factory=dict)
    max_series: int = 1000
    exemplars: bool = True
    exemplar_interval: float = 10.0


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file, defaults filled in. `interval` is in seconds; `collectors` keeps the file's order."""

    server: ServerConfig = ServerConfig()
    interval: float = 5.0
    bpffs: Path = Path("/sys/fs/bpf/bpfmetricsd")
    state: Path = Path("/run/bpfmetricsd")
    journal: bool = True
    collectors: Mapping[str, CollectorConfig] = field(default_factory=dict)


_DEFAULT = Config()


def load(path: Path, options: Mapping[str, tuple[Option, ...]]) -> Config:
    """Read and check the file at `path`; see `parse`. Raises UsageError also where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; create it, or name another with --config") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: this is a directory; name a file with --config") from None
    except PermissionError:
        raise UsageError(f"{path}: not allowed to read it; run as root, or change its permissions") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason}); name another file with --config") from None
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than 1 MiB, so hardly a configuration; name another file with --config")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    return parse(text, str(path), options)


def parse(text: str, source: str, options: Mapping[str, tuple[Option, ...]]) -> Config:
    """Check `text`, the content of the file `source`.

    `options` holds the options of each known collector. Raises UsageError with one line for each fault:
    `FILE:LINE: key.path: what is wrong; what is allowed`.
    """
    faults = Faults(source)
    node = compose(text, faults)
    config = _read_config(Field(node, "", 1, faults), options) if node else _DEFAULT
    faults.raise_any()
    return config


def _read_own_folder(found: Field | None, default: Path) -> Path:
    """A folder that the daemon makes and removes, so never one that it shares, such as /sys/fs/bpf."""
    path = read_path(found)
    if found and path in default.parents:
        found.fault(f"{path} belongs to the system and this folder gets removed", f"write one below it: {default}")
    return path or default


def _read_ports(found: Field | None, default: tuple[int, ...], maximum: int) -> tuple[int, ...]:
    if found is None or not found.expect("write a list of ports such as [22, 443], or [] for none", "seq"):
        return default
    return read_items(found, maximum, lambda item: read_int(item, 0, 1, 65535) or None)


def _read_host(text: str) -> str | None:
    """An address in its one spelling or a host name; None if it is neither."""
    try:
        if _BRACKETED.fullmatch(text):
            return str(ipaddress.IPv6Address(text[1:-1]))
        if not text.strip("0123456789."):
            return str(ipaddress.IPv4Address(text)) if text else ""
    except ValueError:
        return None
    fits = len(text) <= 253 and all(map(_HOST_LABEL.fullmatch, text.split(".")))
    return text.lower() if fits else None


def _read_listen(found: Field) -> Listen | None:
    if not found.expect(_LISTEN, "str"):
        return None
    text: str = found.node.value
    if text == "fd://":
        return Listen(fd=True)
    before, colon, port = text.rpartition(":")
    host = _read_host(before)
    if not colon or not port:
        found.fault(f"{quote(text)} has no port", _LISTEN)
    elif host is None:
        found.fault(f"{quote(before)} is not an address", _LISTEN)
    elif not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        found.fault(f"the port {quote(port)} is not a number from 1 to 65535", _LISTEN)
    else:
        return Listen(host, int(port))
    return None


_KEYS = ("server", "interval", "bpffs", "state", "journal", "defaults", "collectors")
_COMMON = ("max_series", "exemplars", "exemplar_interval")


def _read_config(root: Field, options: Mapping[str, tuple[Option, ...]]) -> Config:
    if not root.expect(f"write a mapping of keys; known: {', '.join(sorted(_KEYS))}", "map", "null"):
        return _DEFAULT
    fields = read_mapping(root, "key", _KEYS)
    common = read_mapping(fields.get("defaults"), "key", _COMMON)
    return Config(
        server=_read_server(read_mapping(fields.get("server"), "key", ("listen", "web_config"))),
        interval=read_duration(fields.get("interval"), _DEFAULT.interval, "1s", "5m"),
        bpffs=_read_own_folder(fields.get("bpffs"), _DEFAULT.bpffs),
        state=_read_own_folder(fields.get("state"), _DEFAULT.state),
        journal=read_bool(fields.get("journal"), _DEFAULT.journal),
        collectors=_read_collectors(
            fields.get("collectors") or replace(root, node=empty_mapping(), path="collectors"),
            options,
            _read_common(common, CollectorConfig()),
        ),
    )


def _read_server(fields: Fields) -> ServerConfig:
    listen = fields.get("listen")
    addresses = _DEFAULT.server.listen
    if listen and kind_of(listen.node) == "seq":
        addresses = read_items(listen, MAX_LISTEN, _read_listen)
        if not listen.node.value:
            listen.fault("the list is empty", _LISTEN)
    elif listen:
        address = _read_listen(listen)
        addresses = (address,) if address else addresses
    web_config = fields.get("web_config")
    if web_config is None or kind_of(web_config.node) == "null":
        return ServerConfig(addresses, None)
    return ServerConfig(addresses, read_path(web_config))


def _read_common(fields: Fields, base: CollectorConfig) -> CollectorConfig:
    """What `defaults` and each collector have in common."""
    return replace(
        base,
        max_series=read_int(fields.get("max_series"), base.max_series, 10, 100_000),
        exemplars=read_bool(fields.get("exemplars"), base.exemplars),
        exemplar_interval=read_duration(fields.get("exemplar_interval"), base.exemplar_interval, "1s", "1h"),
    )


def _read_collectors(
    found: Field, options: Mapping[str, tuple[Option, ...]], base: CollectorConfig
) -> dict[str, CollectorConfig]:
    if kind_of(found.node) == "null" or (kind_of(found.node) == "map" and not found.node.value):
        found.fault("no collector is named", f"name at least one of {', '.join(sorted(options))}")
    collectors: dict[str, CollectorConfig] = {}
    for name, collector in read_mapping(found, "collector", options).items():
        declared = options[name]
        fields = read_mapping(collector, "key", (*_COMMON, *(option.name for option in declared)))
        values = {option.name: _read_option(option, fields.get(option.name)) for option in declared}
        collectors[name] = replace(_read_common(fields, base), options=values)
    return collectors


def _read_option(option: Option, found: Field | None) -> str | int | bool | tuple[int, ...]:
    default: Any = option.default
    match option.kind:
        case "choice":
            return read_choice(found, default, option.choices)
        case "int":
            return read_int(found, default, option.minimum, option.maximum)
        case "bool":
            return read_bool(found, default)
        case "ports":
            return _read_ports(found, default, option.maximum)
