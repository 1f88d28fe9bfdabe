"""`python -m services.worker.rank`: one rank process of a worker group; started by the launcher."""

from __future__ import annotations

import gc


def main() -> int:
    """Run the rank; gives its exit status."""
    # Imports make some million objects that stay; searching them for garbage again and again takes a fifth of the start.
    # The service switches collection on when it has loaded.
    gc.disable()
    from headrace.service import run_service

    return run_service("worker")


if __name__ == "__main__":
    raise SystemExit(main())
