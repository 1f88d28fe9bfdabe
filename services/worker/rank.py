"""`python -m services.worker.rank`: one rank process of a worker group; started by the launcher."""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from headrace.config.load import Settings as SettingsTree
    from services.worker.config import Settings


def main() -> int:
    """Run the rank; gives its exit status."""
    # Imports make some million objects that stay; searching them for garbage again and again takes a fifth of the start.
    # The service switches collection on when it has loaded.
    gc.disable()
    from headrace.service import run_service

    return run_service("worker", prepare=import_ahead)


def import_ahead(tree: SettingsTree) -> None:
    """Import what the worker will want; with torch, that is most of its start."""
    importlib.import_module("services.worker.service")
    if cast("Settings", tree.sections["worker"]).runner == "model":
        from services.worker.torch_import import import_torch

        import_torch()
        importlib.import_module("services.worker.loading")


if __name__ == "__main__":
    raise SystemExit(main())
