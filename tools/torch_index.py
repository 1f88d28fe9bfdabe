"""Prints the pip option that adds an index of torch builds, or nothing where that index does not answer.

    python tools/torch_index.py https://download.pytorch.org/whl/cpu

PyPI's own torch for Linux carries gigabytes of CUDA libraries; the CPU build lies on an index of its own. A machine that
cannot reach it (behind a mirror, or with the wheel in pip's find-links) still installs: pip then uses what it is set up with.
"""

import sys
import urllib.error
import urllib.request

ANSWER_WITHIN_S = 10


def answers(url: str) -> bool:
    """Tell whether the index serves a page for torch."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=ANSWER_WITHIN_S):
            return True
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"torch index {url} does not answer ({error}): using pip's own settings", file=sys.stderr)
        return False


if __name__ == "__main__":
    index = sys.argv[1] if len(sys.argv) > 1 else ""
    if index and answers(index):
        print(f"--extra-index-url={index}")
