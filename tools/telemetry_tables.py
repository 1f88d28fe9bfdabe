"""Prints the tables of docs/telemetry.md as the code has them, for pasting when a name was added."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from headrace.telemetry import metrics, names


def comments() -> dict[str, str]:
    """The docstring or comment line after each constant of the register."""
    text = Path(names.__file__).read_text()
    return dict(re.findall(r'^([A-Z_0-9]+) = "[^"]*"\n"""(.*?)"""', text, re.MULTILINE | re.DOTALL))


def main() -> None:
    """Print spans, attributes, metrics."""
    said = comments()
    for prefix in ("SPAN_", "ATTR_"):
        print(f"\n{prefix}")
        for name, value in vars(names).items():
            if name.startswith(prefix):
                print(f"| `{value}` | {' '.join(said.get(name, '').split())} |")
    print("\nmetrics")
    for name, group in inspect.getmembers(metrics, inspect.isclass):
        if name.endswith("Metrics"):
            registry = CollectorRegistry()
            group(registry)  # type: ignore[call-arg]
            for metric in registry.collect():
                full = f"{metric.name}_total" if metric.type == "counter" else metric.name
                print(f"| `{full}` | {metric.type} | {metric.documentation} |")


if __name__ == "__main__":
    main()
