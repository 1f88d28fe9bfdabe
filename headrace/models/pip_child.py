"""Entry of the child process that runs pip for a pull: it dies with the process that started it, however that ends.

Run as `python -m headrace.models.pip_child <parent pid> <pip arguments>`. Without the tie, pip would go on downloading into a
directory that the next pull removes.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Ask the kernel for SIGKILL at the parent's death, then become pip."""
    parent_pid = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        # The parent ended before the request took hold.
        sys.exit("pull: the process that started this download is gone")
    sys.argv = ["pip", *sys.argv[2:]]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
