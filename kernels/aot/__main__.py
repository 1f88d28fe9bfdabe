"""Ahead-of-time compilation of the kernels, without a GPU.

python -m kernels.aot report           compile everything, write kernels/RESOURCES.md
python -m kernels.aot check [--quick]  compile, and say what is wrong
"""

from __future__ import annotations

import argparse
import sys

from kernels.aot.compiling import Outcome, compile_all, compile_shard, to_json
from kernels.aot.fingerprint import fingerprints
from kernels.aot.registry import all_cases, all_workloads
from kernels.aot.report import RESOURCES_PATH, write


def main(arguments: list[str]) -> int:
    """Run one command; 1 when a case has a problem."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="compile everything and write RESOURCES.md")
    check = commands.add_parser("check", help="compile, and say what is wrong")
    shard = commands.add_parser("shard", help="compile every n-th case; one JSON line each (used by the others)")
    shard.add_argument("index", type=int)
    shard.add_argument("num_shards", type=int)
    for each in (check, shard):
        each.add_argument("--quick", action="store_true", help="only the subset that `make test` compiles")
        each.add_argument("--op", help="only the cases of one op")
    options = parser.parse_args(arguments)
    if options.command == "shard":
        for outcome in compile_shard(options.index, options.num_shards, quick=options.quick, op=options.op):
            print(to_json(outcome), flush=True)
        return 0
    if options.command == "check":
        outcomes = compile_all(quick=options.quick, op=options.op)
        return _conclude(outcomes)
    outcomes = compile_all(quick=False)
    status = _conclude(outcomes)
    if status == 0:
        write(outcomes, fingerprints(all_cases()), all_workloads())
        print(f"written: {RESOURCES_PATH}")
    return status


def _conclude(outcomes: dict[str, Outcome]) -> int:
    found = [problem for each in outcomes.values() for problem in each.problems]
    slowest = max(outcomes.values(), key=lambda each: each.compile_s, default=None)
    if slowest is not None:
        total_s = sum(each.compile_s for each in outcomes.values())
        print(f"{len(outcomes)} cases, {total_s:.1f} s of compiling; slowest {slowest.compile_s:.1f} s: {slowest.key}")
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
