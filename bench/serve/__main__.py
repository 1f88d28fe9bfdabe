"""`python -m bench.serve`: the same command as `headrace bench serve`."""

from __future__ import annotations

from bench.serve.cli import serve

if __name__ == "__main__":
    serve(prog_name="bench.serve")
