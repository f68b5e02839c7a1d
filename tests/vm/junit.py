# SPDX-License-Identifier: Apache-2.0
"""What a guest's pytest wrote about its tests."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree


@dataclass(frozen=True, slots=True)
class Case:
    """One test of the guest. `outcome` is passed, failed or skipped; `text` says why."""

    name: str
    outcome: str
    text: str
    seconds: float


def cases(junit: str) -> list[Case]:
    """What a JUnit file of pytest (family xunit1) tells."""
    found = []
    for element in ElementTree.fromstring(junit).iter("testcase"):
        outcome, text = "passed", ""
        for child in element:
            if child.tag in ("failure", "error"):
                outcome, text = "failed", child.text or child.get("message") or ""
            elif child.tag == "skipped":
                outcome, text = "skipped", child.get("message") or child.text or ""
        file = element.get("file") or element.get("classname", "")
        found.append(Case(f"{file}::{element.get('name')}", outcome, text, float(element.get("time", 0))))
    return found
