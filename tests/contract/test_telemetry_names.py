"""docs/telemetry.md and the code name the same spans, attributes and metrics."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from headrace.telemetry import metrics, names

PROJECT = Path(__file__).parents[2]


def documented(heading: str) -> list[str]:
    """The first column of the table under a heading."""
    text = (PROJECT / "docs/telemetry.md").read_text()
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def constants(prefix: str) -> list[str]:
    return [value for name, value in vars(names).items() if name.startswith(prefix)]


def test_every_span_is_documented_once_and_exists() -> None:
    assert sorted(documented("Spans")) == sorted(constants("SPAN_"))


def test_every_attribute_is_documented_once_and_exists() -> None:
    assert sorted(documented("Attributes")) == sorted(constants("ATTR_"))


def test_every_metric_is_documented_once_and_exists() -> None:
    registry = CollectorRegistry()
    for name, group in inspect.getmembers(metrics, inspect.isclass):
        if name.endswith("Metrics"):
            group(registry)
    exposed = [f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in registry.collect()]
    assert sorted(documented("Metrics")) == sorted(exposed)
    assert all(name.startswith("headrace_") for name in exposed)


def test_names_are_written_in_the_register_only() -> None:
    """A span or attribute given as a string elsewhere would escape the register."""
    for folder in ("headrace", "services"):
        for path in (PROJECT / folder).rglob("*.py"):
            if "v1" in path.parts or path.parent.name == "telemetry":
                continue
            found = re.findall(r'(?:tracer\.(?:start|record)|span\.set)\(\s*f?"', path.read_text())
            assert not found, f"{path}: {found}"


def test_every_name_of_the_register_is_used() -> None:
    code = "\n".join(
        path.read_text()
        for folder in ("headrace", "services")
        for path in (PROJECT / folder).rglob("*.py")
        if path.name != "names.py"
    )
    unused = [name for name in vars(names) if name.startswith(("SPAN_", "ATTR_")) and f"names.{name}" not in code]
    assert unused == []
