"""Prints what an extra of pyproject.toml requires, one line each; without an argument, what every service requires.

    python tools/requirements.py [EXTRA] | pip install -r /dev/stdin -c constraints.txt

For the Dockerfile: dependencies become a layer of their own, below our code. Needs nothing but the standard library.
"""

import sys
import tomllib
from pathlib import Path

# Beside this file in an image, one folder up in the repository.
HERE = Path(__file__).resolve().parent
PYPROJECT = HERE / "pyproject.toml" if (HERE / "pyproject.toml").exists() else HERE.parent / "pyproject.toml"


def requirements(extra: str | None) -> list[str]:
    """Return the requirement lines of one extra, or the base's."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    if extra is None:
        return list(project["dependencies"])
    if extra not in project["optional-dependencies"]:
        sys.exit(f"requirements: no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}")
    return list(project["optional-dependencies"][extra])


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1] if len(sys.argv) > 1 else None)))
