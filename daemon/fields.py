# SPDX-License-Identifier: Apache-2.0
"""YAML files that people write: every fault at once, each with its line and key.

A file is composed into YAML nodes and never constructed, so no tag creates an object, aliases are not expanded, and
each fault knows its line. Readers return the default where they report a fault: reading goes on, and
`Faults.raise_any` raises at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import yaml

from daemon.errors import UsageError

MAX_DEPTH = 32
_T = TypeVar("_T")
TAG = "tag:yaml.org,2002:"
FOUND = {
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


def parse_duration(text: str) -> float:
    """Seconds in a duration such as `250ms`. Raises ValueError with the cause."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{quote(text)} is not a duration")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text} has no unit")
    if unit not in _UNITS:
        raise ValueError(f"{quote(text)} has an unknown unit")
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
class Field:
    """A node with the way to it. `line` is that of its key, which is where a person looks."""

    node: yaml.Node
    path: str
    line: int
    faults: Faults

    def fault(self, wrong: str, allowed: str) -> None:
        self.faults.add(self.line, self.path, wrong, allowed)

    def expect(self, allowed: str, *kinds: str) -> bool:
        """Whether the node is of one of these kinds; a fault if not."""
        kind = kind_of(self.node)
        if kind in kinds:
            return True
        if kind is None:
            self.fault(f"the tag {quote(self.node.tag.replace(TAG, '!!'))} is not allowed", "remove it")
        else:
            self.fault(f"found {FOUND[kind]}", allowed)
        return False


Fields = Mapping[str, Field]


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


def compose(text: str, faults: Faults) -> yaml.Node | None:
    """The root node, an empty mapping for an empty file, or None and a fault."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.add(line, "", f"the character {text[error.position]!a} is not allowed in YAML", "remove it")
        return None
    try:
        return loader.get_single_node() or empty_mapping()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else loader.line
        faults.add(line + 1, "", *_syntax_fault(error, text.splitlines()[line : line + 1]))
    except (ValueError, OverflowError):  # PyYAML lets these escape from "\UFFFFFFFF" and from %YAML 1.(many digits)
        faults.add(loader.line + 1, "", "not valid YAML: a number in it is too large", "correct or remove it")
    finally:
        loader.dispose()
    return None


def empty_mapping() -> yaml.Node:
    return yaml.MappingNode(f"{TAG}map", [])


def _syntax_fault(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[str, str]:
    if error.problem == "but found another document":
        return "a second document starts here", "keep one, and remove the line ---"
    line = "".join(lines)
    begun = f"{error.context} from line {error.context_mark.line + 1}" if error.context_mark else error.context
    reason = ", ".join(part for part in (begun, error.problem) if part)
    wrong = f"not valid YAML: {shorten(' '.join(reason.split()), 200)}"
    if "\t" in line:
        return wrong, "indent with spaces, not with tabs"
    if "]:" in line:
        return wrong, 'quote an IPv6 address: "[::1]:10435"'
    return wrong, "check indentation, colons and quotes on this line and the one before"


def kind_of(node: yaml.Node) -> str | None:
    """The tag's short name (`map`, `int`), or None for a tag that the core schema does not give this node."""
    kind = node.tag.removeprefix(TAG)
    if isinstance(node, yaml.CollectionNode):
        fits = kind == ("seq" if isinstance(node, yaml.SequenceNode) else "map")
    else:
        fits = kind in FOUND and kind not in ("seq", "map")
    return kind if fits and node.tag.startswith(TAG) else None


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quote(text: str) -> str:
    return repr(shorten(text, 60))


def read_mapping(found: Field | None, noun: str, known: Collection[str]) -> dict[str, Field]:
    """The known keys of a mapping. Nothing (`server:`) is an empty mapping."""
    names = f"known: {', '.join(sorted(known))}"
    if found is None or not found.expect(f"write a mapping of {noun}s; {names}", "map", "null"):
        return {}
    fields: dict[str, Field] = {}
    for key, value in found.node.value if kind_of(found.node) == "map" else ():
        name = _read_key(found, key)
        if name is None:
            continue
        shown = name if re.fullmatch(r"[\w-]{1,60}", name, re.ASCII) else quote(name)
        path = f"{found.path}.{shown}" if found.path else shown
        child = Field(value, path, key.start_mark.line + 1, found.faults)
        if name in fields:
            child.fault(f"given twice, first on line {fields[name].line}", "keep one")
        elif name in known:
            fields[name] = child
        else:
            child.fault(f"unknown {noun}", f"{near_miss(name, known)}{names}")
    return fields


def _read_key(found: Field, key: yaml.Node) -> str | None:
    at = replace(found, node=key, line=key.start_mark.line + 1)
    if kind_of(key) == "merge":
        at.fault("merge keys (<<) are not allowed", "write the keys out")
    elif isinstance(key, yaml.CollectionNode):
        at.fault("a key is a list or a mapping", "write a word as the key")
    elif at.expect("write a word as the key", *FOUND):
        return str(key.value)
    return None


def near_miss(name: str, known: Collection[str]) -> str:
    import difflib  # takes half a megabyte, for faults only

    close = difflib.get_close_matches(name.lower(), known, 1)
    return f"did you mean {close[0]}? " if close else ""


def read_bool(found: Field | None, default: bool) -> bool:
    if found is None or not found.expect("write true or false", "bool"):
        return default
    value: bool | None = _BOOLS.get(found.node.value.lower())
    if value is None:  # !!bool maybe
        found.fault(f"{quote(found.node.value)} is not a boolean", "write true or false")
    return default if value is None else value


def read_int(found: Field | None, default: int, minimum: int, maximum: int) -> int:
    allowed = f"write a whole number from {minimum} to {maximum}"
    if found is None or not found.expect(allowed, "int"):
        return default
    text = found.node.value
    if not _DECIMAL.fullmatch(text):  # 0x10, 1_000, and 010, which YAML 1.1 reads as eight
        found.fault(f"{quote(text)} is not in plain decimal digits", allowed)
    elif len(text) > 18 or not minimum <= int(text) <= maximum:
        found.fault(f"{shorten(text, 30)} is out of range", allowed)
    else:
        return int(text)
    return default


def read_duration(found: Field | None, default: float, minimum: str, maximum: str) -> float:
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


def read_choice(found: Field | None, default: str, choices: Collection[str]) -> str:
    allowed = f"write one of {', '.join(choices)}"
    if found is None or not found.expect(allowed, "str"):
        return default
    text: str = found.node.value
    if text in choices:
        return text
    found.fault(f"{quote(text)} is not known", f"{near_miss(text, choices)}{allowed}")
    return default


def read_path(found: Field | None) -> Path | None:
    allowed = "write the whole path, from / on"
    if found is None or not found.expect(allowed, "str"):
        return None
    text: str = found.node.value
    if not text.startswith("/"):
        found.fault(f"{quote(text)} is not an absolute path", allowed)
    elif not text.isprintable():
        found.fault(f"{quote(text)} has a character that cannot be printed", allowed)
    elif ".." in text.split("/"):
        found.fault(f"{quote(text)} leads through ..", "write the path without it")
    else:
        return Path("/" + text.lstrip("/"))
    return None


def read_items(found: Field, maximum: int, read: Callable[[Field], _T | None]) -> tuple[_T, ...]:
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
