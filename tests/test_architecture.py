# SPDX-License-Identifier: Apache-2.0
"""Rules that hold over the whole tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import collectors
from daemon.config import parse
from daemon.model import Metric

ROOT = Path(__file__).resolve().parent.parent

# Data flows from left to right; a module imports only from modules before it.
ORDER = [
    "errors",
    "model",
    "declare",
    "histogram",
    "cgroups",
    "clock",
    "layout",
    "libbpf",
    "btf",
    "manifest",
    "pins",
    "fields",
    "config",
    "compiler",
    "attach",
    "coverage",
    "build",
    "loader",
    "lean",
    "reader",
    "unit",
    "selfmetrics",
    "engine",
    "exposition",
    "words",
    "recent",
    "triage",
    "pictures",
    "cards",
    "look",
    "page",
    "negotiation",
    "notify",
    "journal",
    "privileges",
    "listening",
    "webconfig",
    "app",
    "server",
    "screen",
    "show",
    "service",
    "foreground",
    "commands",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """The daemon's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "daemon":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("daemon."):
            found.add(node.module.removeprefix("daemon."))
    return {name for name in found if (ROOT / "daemon" / f"{name}.py").exists()}


def test_every_module_has_its_place() -> None:
    assert sorted(path.stem for path in (ROOT / "daemon").glob("*.py") if path.stem != "__init__") == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_from_the_left(module: str) -> None:
    before = set(ORDER[: ORDER.index(module)])
    assert imports(ROOT / "daemon" / f"{module}.py") <= before


def test_only_the_compiler_imports_bcc() -> None:
    importers = []
    for path in [*(ROOT / "daemon").glob("*.py"), *(ROOT / "collectors").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "bcc" in names or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bcc"):
                importers.append(path.name)
    assert importers == ["compiler.py"]


@pytest.mark.parametrize("collector", collectors.ALL, ids=lambda collector: collector.name)
def test_one_stem_names_program_collector_and_tests(collector: collectors.Collector) -> None:
    for place in ("bpf/{}.bpf.c", "collectors/{}.py", "tests/collectors/test_{}.py", "tests/kernel/test_{}.py"):
        assert (ROOT / place.format(collector.name)).is_file(), place.format(collector.name)


def every_metric() -> list[Metric]:
    return [
        metric
        for collector in collectors.ALL
        for metric in collector.metrics({option.name: option.default for option in collector.options})
    ]


def test_metric_names_are_unique_and_follow_the_conventions() -> None:
    names = [metric.name for metric in every_metric()]
    assert len(set(names)) == len(names)
    for metric in every_metric():
        assert metric.name.startswith("bpf_")
        assert not metric.name.endswith(("_total", "_info", "_count", "_sum", "_bucket"))
        assert metric.help.endswith((".", "pages", ")."))
        assert not metric.unit or metric.name.endswith(f"_{metric.unit}")
        assert (metric.type == "histogram") == bool(metric.bounds)
        assert not set(metric.labels) & set(metric.name.split("_"))


def test_shipped_configuration_names_all_collectors_with_their_defaults() -> None:
    path = ROOT / "config" / "bpfmetricsd.yaml"
    options = {collector.name: collector.options for collector in collectors.ALL}
    shipped = parse(path.read_text(), str(path), options)
    nothing = parse("collectors: {" + ", ".join(f"{name}: {{}}" for name in options) + "}", "defaults", options)
    assert shipped == nothing


def test_every_source_says_its_licence() -> None:
    for folder, pattern in (("daemon", "*.py"), ("collectors", "*.py"), ("tests", "**/*.py"), ("bpf", "**/*.[ch]")):
        for path in (ROOT / folder).glob(pattern):
            if "shim" not in path.parts:
                assert "SPDX-License-Identifier: " in "".join(path.read_text().splitlines(True)[:2]), path
