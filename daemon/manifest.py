# SPDX-License-Identifier: Apache-2.0
"""What was loaded, one JSON file a collector: written last, and gone with the boot as the pins are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """One program: where it hangs, whether its count is exact, and if not why (`approximate`)."""

    hook: str
    approximate: str = ""

    @property
    def fidelity(self) -> str:
        return "approximate" if self.approximate else "exact"


@dataclass(frozen=True, slots=True)
class MapShape:
    type: str
    key_size: int
    value_size: int
    max_entries: int
    key: Any
    value: Any


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is loaded of one collector.

    `started` is when counting into these maps began, in seconds since the epoch, and `truth` the kernel's own account
    as it was then: the texts of the files that hold it. `generation` is what the control map must hold while these
    programs count. `notes` says what cannot be seen here at all, by part. `error` is set when the last load failed:
    with no maps nothing is loaded, with maps what had been loaded before counts on.
    """

    collector: str
    program_hash: str = ""
    layout_hash: str = ""
    version: str = ""
    bcc: str = ""
    started: float = 0.0
    generation: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    programs: Mapping[str, ProgramInfo] = field(default_factory=dict)
    maps: Mapping[str, MapShape] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    truth: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


class DamagedManifest(ValueError):
    """The file is there, but is not a manifest of this format."""


def path(state: Path, collector: str) -> Path:
    return state / f"{collector}.json"


def read(state: Path, collector: str) -> Manifest | None:
    """None where there is none. Raises `DamagedManifest`."""
    place = path(state, collector)
    try:
        raw = json.loads(place.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedManifest(f"{place} cannot be read ({error}); run 'bpfmetricsd load' to write it again") from error
    try:
        return parse(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedManifest(f"{place} is damaged ({error!r}); run 'bpfmetricsd load' to write it again") from error


def parse(raw: Any) -> Manifest:
    if raw.pop("format") != FORMAT:
        raise KeyError("format")
    programs = {name: ProgramInfo(**one) for name, one in raw.pop("programs").items()}
    maps = {name: MapShape(**one) for name, one in raw.pop("maps").items()}
    return Manifest(programs=programs, maps=maps, **raw)


def write(state: Path, manifest: Manifest) -> None:
    """Written to a temporary file and renamed, so that a reader sees the old one or the new one."""
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = state / f".{manifest.collector}.{os.getpid()}"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}))
    temporary.chmod(0o644)
    temporary.replace(path(state, manifest.collector))


def remove(state: Path, collector: str) -> None:
    for leftover in state.glob(f".{collector}.*"):
        leftover.unlink(missing_ok=True)
    path(state, collector).unlink(missing_ok=True)
