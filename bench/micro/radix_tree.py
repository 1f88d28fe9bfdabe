"""Operations per second of the scheduler's radix tree.

    python -m bench.micro.radix_tree [--json FILE] [--tokens N] [--page-size N]

Sequences of 1,000 tokens. Two loads: `shared`, where one of 32 first halves is followed by a half of its own, as with system
prompts, and `random`, where nothing is shared. Insert and match are timed over all sequences; evict as the median over many calls,
each of 200 tokens, with all other leaves in place.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from array import array
from pathlib import Path

from bench.machine import provenance
from services.scheduler.radix_tree import RadixTree

SEQUENCE_TOKENS = 1000
NUM_SHARED_HALVES = 32
VOCAB_SIZE = 50_000
EVICT_TOKENS = 200
SIZES = (100_000, 1_000_000, 10_000_000)


def sequences(load: str, num_sequences: int) -> list[array[int]]:
    """The token sequences of a load."""
    rng = random.Random(0)

    def some(count: int) -> array[int]:
        return array("i", rng.choices(range(VOCAB_SIZE), k=count))

    if load == "random":
        return [some(SEQUENCE_TOKENS) for _ in range(num_sequences)]
    halves = [some(SEQUENCE_TOKENS // 2) for _ in range(NUM_SHARED_HALVES)]
    return [rng.choice(halves) + some(SEQUENCE_TOKENS // 2) for _ in range(num_sequences)]


def measure(load: str, num_tokens: int, page_size: int) -> dict[str, object]:
    """Time one load at one size of the tree."""
    tokens = sequences(load, num_tokens // SEQUENCE_TOKENS)
    num_pages = SEQUENCE_TOKENS // page_size
    full = num_pages * page_size
    tree = RadixTree(page_size)
    pages = [list(range(index * num_pages, (index + 1) * num_pages)) for index in range(len(tokens))]
    gc.collect()
    started = time.perf_counter()
    for one, own in zip(tokens, pages, strict=True):
        tree.insert(one.tobytes()[: full * 4], own)
    inserted = time.perf_counter()
    for one in tokens:
        tree.match(one.tobytes(), num_pages)
    matched = time.perf_counter()
    num_leaves = sum(1 for node in tree.nodes() if not node.children)
    pages_a_call = -(-EVICT_TOKENS // page_size)
    evictions = []
    for _ in range(min(2000, tree.num_pages // pages_a_call // 2)):
        begun = time.perf_counter_ns()
        tree.evict(pages_a_call)
        evictions.append((time.perf_counter_ns() - begun) / 1e3)
    return {
        "load": load,
        "num_tokens": num_tokens,
        "page_size": page_size,
        "num_leaves": num_leaves,
        "inserts_per_s": round(len(tokens) / (inserted - started)),
        "matches_per_s": round(len(tokens) / (matched - inserted)),
        "evict_us": round(statistics.median(evictions), 2),
        "evict_us_p99": round(statistics.quantiles(evictions, n=100)[98], 2),
    }


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tokens", type=int, help=f"tokens in the tree (default: {', '.join(map(str, SIZES))})")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page (default 16)")
    arguments = parser.parse_args()
    rows = []
    print(f"{'load':8}{'tokens':>11}{'leaves':>8}{'insert/s':>10}{'match/s':>10}{'evict µs':>10}{'p99':>8}")
    for num_tokens in (arguments.tokens,) if arguments.tokens else SIZES:
        for load in ("shared", "random"):
            row = measure(load, num_tokens, arguments.page_size)
            rows.append(row)
            print(
                f"{row['load']:8}{row['num_tokens']:>11}{row['num_leaves']:>8}{row['inserts_per_s']:>10}"
                f"{row['matches_per_s']:>10}{row['evict_us']:>10}{row['evict_us_p99']:>8}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
