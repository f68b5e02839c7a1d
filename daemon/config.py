# SPDX-License-Identifier: Apache-2.0
"""The configuration file: YAML in, a checked `Config` out, or every fault in the file at once.

The file is composed into YAML nodes and never constructed, so no tag creates an object, aliases are not
expanded, and each fault knows its line. Readers return the default where they report a fault: reading goes on,
and `parse` raises at the end.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import yaml

from daemon.declare import Option
from daemon.errors import UsageError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_LISTEN = 16

_T = TypeVar("_T")
_TAG = "tag:yaml.org,2002:"
_FOUND = {
    "null": "nothing",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "timestamp": "a date",
    "merge": "a string",
    "value": "a string",
    "seq": "a list",
    "map": "a mapping",
}
_BOOLS = yaml.constructor.SafeConstructor.bool_values
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([A-Za-z]*)")
_UNITS = {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)")
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
    node = _compose(text, faults)
    config = _read_config(_Field(node, "", 1, faults), options) if node else _DEFAULT
    faults.raise_any()
    return config


def parse_duration(text: str) -> float:
    """Seconds in a duration such as `250ms`. Raises ValueError with the cause."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{_quote(text)} is not a duration")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text} has no unit")
    if unit not in _UNITS:
        raise ValueError(f"{_quote(text)} has an unknown unit")
    return float(Decimal(number) * _UNITS[unit])


class Faults:
    """The faults found so far in one file."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, path: str, wrong: str, allowed: str) -> None:
        where = f"{path}: " if path else ""
        self._found.append((line, f"{self._source}:{line}: {where}{wrong}; {allowed}"))

    def raise_any(self) -> None:
        if self._found:
            raise UsageError(*(text for _, text in sorted(self._found, key=lambda found: found[0])))


@dataclass(frozen=True, slots=True)
class _Field:
    """A node with the way to it. `line` is that of its key, which is where a person looks."""

    node: yaml.Node
    path: str
    line: int
    faults: Faults

    def fault(self, wrong: str, allowed: str) -> None:
        self.faults.add(self.line, self.path, wrong, allowed)

    def expect(self, allowed: str, *kinds: str) -> bool:
        """Whether the node is of one of these kinds; a fault if not."""
        kind = _kind(self.node)
        if kind in kinds:
            return True
        if kind is None:
            self.fault(f"the tag {_quote(self.node.tag.replace(_TAG, '!!'))} is not allowed", "remove it")
        else:
            self.fault(f"found {_FOUND[kind]}", allowed)
        return False


_Fields = Mapping[str, _Field]


# Text to nodes


class _Loader(yaml.SafeLoader):
    """Composes only, and refuses depth before Python's stack does."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if parent and self.depth == MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=parent.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, faults: Faults) -> yaml.Node | None:
    """The root node, an empty mapping for an empty file, or None and a fault."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.add(line, "", f"the character {text[error.position]!a} is not allowed in YAML", "remove it")
        return None
    try:
        return loader.get_single_node() or _empty_mapping()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else loader.line
        faults.add(line + 1, "", *_syntax_fault(error, text.splitlines()[line : line + 1]))
    except (ValueError, OverflowError):  # PyYAML lets these escape from "\UFFFFFFFF" and from %YAML 1.(many digits)
        faults.add(loader.line + 1, "", "not valid YAML: a number in it is too large", "correct or remove it")
    finally:
        loader.dispose()
    return None


def _empty_mapping() -> yaml.Node:
    return yaml.MappingNode(f"{_TAG}map", [])


def _syntax_fault(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[str, str]:
    if error.problem == "but found another document":
        return "a second document starts here", "keep one, and remove the line ---"
    line = "".join(lines)
    begun = f"{error.context} from line {error.context_mark.line + 1}" if error.context_mark else error.context
    reason = ", ".join(part for part in (begun, error.problem) if part)
    wrong = f"not valid YAML: {_shorten(' '.join(reason.split()), 200)}"
    if "\t" in line:
        return wrong, "indent with spaces, not with tabs"
    if "]:" in line:
        return wrong, 'quote an IPv6 address: "[::1]:10435"'
    return wrong, "check indentation, colons and quotes on this line and the one before"


def _kind(node: yaml.Node) -> str | None:
    """The tag's short name (`map`, `int`), or None for a tag that the core schema does not give this node."""
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.CollectionNode):
        fits = kind == ("seq" if isinstance(node, yaml.SequenceNode) else "map")
    else:
        fits = kind in _FOUND and kind not in ("seq", "map")
    return kind if fits and node.tag.startswith(_TAG) else None


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _quote(text: str) -> str:
    return repr(_shorten(text, 60))


# Readers, one for each kind of value


def _read_mapping(found: _Field | None, noun: str, known: Collection[str]) -> dict[str, _Field]:
    """The known keys of a mapping. Nothing (`server:`) is an empty mapping."""
    names = f"known: {', '.join(sorted(known))}"
    if found is None or not found.expect(f"write a mapping of {noun}s; {names}", "map", "null"):
        return {}
    fields: dict[str, _Field] = {}
    for key, value in found.node.value if _kind(found.node) == "map" else ():
        name = _read_key(found, key)
        if name is None:
            continue
        shown = name if re.fullmatch(r"[\w-]{1,60}", name, re.ASCII) else _quote(name)
        path = f"{found.path}.{shown}" if found.path else shown
        child = _Field(value, path, key.start_mark.line + 1, found.faults)
        if name in fields:
            child.fault(f"given twice, first on line {fields[name].line}", "keep one")
        elif name in known:
            fields[name] = child
        else:
            child.fault(f"unknown {noun}", f"{_near_miss(name, known)}{names}")
    return fields


def _read_key(found: _Field, key: yaml.Node) -> str | None:
    at = replace(found, node=key, line=key.start_mark.line + 1)
    if _kind(key) == "merge":
        at.fault("merge keys (<<) are not allowed", "write the keys out")
    elif isinstance(key, yaml.CollectionNode):
        at.fault("a key is a list or a mapping", "write a word as the key")
    elif at.expect("write a word as the key", *_FOUND):
        return str(key.value)
    return None


def _near_miss(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, 1)
    return f"did you mean {close[0]}? " if close else ""


def _read_bool(found: _Field | None, default: bool) -> bool:
    if found is None or not found.expect("write true or false", "bool"):
        return default
    value: bool | None = _BOOLS.get(found.node.value.lower())
    if value is None:  # !!bool maybe
        found.fault(f"{_quote(found.node.value)} is not a boolean", "write true or false")
    return default if value is None else value


def _read_int(found: _Field | None, default: int, minimum: int, maximum: int) -> int:
    allowed = f"write a whole number from {minimum} to {maximum}"
    if found is None or not found.expect(allowed, "int"):
        return default
    text = found.node.value
    if not _DECIMAL.fullmatch(text):  # 0x10, 1_000, and 010, which YAML 1.1 reads as eight
        found.fault(f"{_quote(text)} is not in plain decimal digits", allowed)
    elif len(text) > 18 or not minimum <= int(text) <= maximum:
        found.fault(f"{_shorten(text, 30)} is out of range", allowed)
    else:
        return int(text)
    return default


def _read_duration(found: _Field | None, default: float, minimum: str, maximum: str) -> float:
    allowed = f"write a duration from {minimum} to {maximum} (units: {', '.join(_UNITS)})"
    if found is None or not found.expect(allowed, "str", "int", "float"):
        return default
    try:
        seconds = parse_duration(found.node.value)
    except ValueError as error:
        found.fault(str(error), allowed)
        return default
    if parse_duration(minimum) <= seconds <= parse_duration(maximum):
        return seconds
    found.fault(f"{found.node.value} is out of range", allowed)
    return default


def _read_choice(found: _Field | None, default: str, choices: Collection[str]) -> str:
    allowed = f"write one of {', '.join(choices)}"
    if found is None or not found.expect(allowed, "str"):
        return default
    text: str = found.node.value
    if text in choices:
        return text
    found.fault(f"{_quote(text)} is not known", f"{_near_miss(text, choices)}{allowed}")
    return default


def _read_path(found: _Field | None) -> Path | None:
    allowed = "write the whole path, from / on"
    if found is None or not found.expect(allowed, "str"):
        return None
    text: str = found.node.value
    if not text.startswith("/"):
        found.fault(f"{_quote(text)} is not an absolute path", allowed)
    elif not text.isprintable():
        found.fault(f"{_quote(text)} has a character that cannot be printed", allowed)
    elif ".." in text.split("/"):
        found.fault(f"{_quote(text)} leads through ..", "write the path without it")
    else:
        return Path("/" + text.lstrip("/"))
    return None


def _read_own_folder(found: _Field | None, default: Path) -> Path:
    """A folder that the daemon makes and removes, so never one that it shares, such as /sys/fs/bpf."""
    path = _read_path(found)
    if found and path in default.parents:
        found.fault(f"{path} belongs to the system and this folder gets removed", f"write one below it: {default}")
    return path or default


def _read_items(found: _Field, maximum: int, read: Callable[[_Field], _T | None]) -> tuple[_T, ...]:
    """The items of a list, each given once. A list that is too long is one fault and is not read."""
    nodes = found.node.value
    if len(nodes) > maximum:
        found.fault(f"{len(nodes)} entries are too many", f"keep at most {maximum}")
        return ()
    items: list[_T] = []
    for index, node in enumerate(nodes):
        line = node.start_mark.line + 1
        child = replace(found, node=node, path=f"{found.path}[{index}]", line=line)
        item = read(child)
        if item in items:
            child.fault(f"{item} is given twice", "keep one")
        elif item is not None:
            items.append(item)
    return tuple(items)


def _read_ports(found: _Field | None, default: tuple[int, ...], maximum: int) -> tuple[int, ...]:
    if found is None or not found.expect("write a list of ports such as [22, 443], or [] for none", "seq"):
        return default
    return _read_items(found, maximum, lambda item: _read_int(item, 0, 1, 65535) or None)


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


def _read_listen(found: _Field) -> Listen | None:
    if not found.expect(_LISTEN, "str"):
        return None
    text: str = found.node.value
    if text == "fd://":
        return Listen(fd=True)
    before, colon, port = text.rpartition(":")
    host = _read_host(before)
    if not colon or not port:
        found.fault(f"{_quote(text)} has no port", _LISTEN)
    elif host is None:
        found.fault(f"{_quote(before)} is not an address", _LISTEN)
    elif not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        found.fault(f"the port {_quote(port)} is not a number from 1 to 65535", _LISTEN)
    else:
        return Listen(host, int(port))
    return None


# The sections of the file

_KEYS = ("server", "interval", "bpffs", "state", "journal", "defaults", "collectors")
_COMMON = ("max_series", "exemplars", "exemplar_interval")


def _read_config(root: _Field, options: Mapping[str, tuple[Option, ...]]) -> Config:
    if not root.expect(f"write a mapping of keys; known: {', '.join(sorted(_KEYS))}", "map", "null"):
        return _DEFAULT
    fields = _read_mapping(root, "key", _KEYS)
    common = _read_mapping(fields.get("defaults"), "key", _COMMON)
    return Config(
        server=_read_server(_read_mapping(fields.get("server"), "key", ("listen", "web_config"))),
        interval=_read_duration(fields.get("interval"), _DEFAULT.interval, "1s", "5m"),
        bpffs=_read_own_folder(fields.get("bpffs"), _DEFAULT.bpffs),
        state=_read_own_folder(fields.get("state"), _DEFAULT.state),
        journal=_read_bool(fields.get("journal"), _DEFAULT.journal),
        collectors=_read_collectors(
            fields.get("collectors") or replace(root, node=_empty_mapping(), path="collectors"),
            options,
            _read_common(common, CollectorConfig()),
        ),
    )


def _read_server(fields: _Fields) -> ServerConfig:
    listen = fields.get("listen")
    addresses = _DEFAULT.server.listen
    if listen and _kind(listen.node) == "seq":
        addresses = _read_items(listen, MAX_LISTEN, _read_listen)
        if not listen.node.value:
            listen.fault("the list is empty", _LISTEN)
    elif listen:
        address = _read_listen(listen)
        addresses = (address,) if address else addresses
    web_config = fields.get("web_config")
    if web_config is None or _kind(web_config.node) == "null":
        return ServerConfig(addresses, None)
    return ServerConfig(addresses, _read_path(web_config))


def _read_common(fields: _Fields, base: CollectorConfig) -> CollectorConfig:
    """What `defaults` and each collector have in common."""
    return replace(
        base,
        max_series=_read_int(fields.get("max_series"), base.max_series, 10, 100_000),
        exemplars=_read_bool(fields.get("exemplars"), base.exemplars),
        exemplar_interval=_read_duration(fields.get("exemplar_interval"), base.exemplar_interval, "1s", "1h"),
    )


def _read_collectors(
    found: _Field, options: Mapping[str, tuple[Option, ...]], base: CollectorConfig
) -> dict[str, CollectorConfig]:
    if _kind(found.node) == "null" or (_kind(found.node) == "map" and not found.node.value):
        found.fault("no collector is named", f"name at least one of {', '.join(sorted(options))}")
    collectors: dict[str, CollectorConfig] = {}
    for name, collector in _read_mapping(found, "collector", options).items():
        declared = options[name]
        fields = _read_mapping(collector, "key", (*_COMMON, *(option.name for option in declared)))
        values = {option.name: _read_option(option, fields.get(option.name)) for option in declared}
        collectors[name] = replace(_read_common(fields, base), options=values)
    return collectors


def _read_option(option: Option, found: _Field | None) -> str | int | bool | tuple[int, ...]:
    default: Any = option.default
    match option.kind:
        case "choice":
            return _read_choice(found, default, option.choices)
        case "int":
            return _read_int(found, default, option.minimum, option.maximum)
        case "bool":
            return _read_bool(found, default)
        case "ports":
            return _read_ports(found, default, option.maximum)
