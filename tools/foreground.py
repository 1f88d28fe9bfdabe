"""Runs a program as the terminal's own foreground group: Ctrl-C reaches it, and not the `make` that started it.

    exec python tools/foreground.py PROGRAM ARGUMENT...

Without this, make takes Ctrl-C too and ends with status 130 however well the program stopped. The program replaces this
process, so make still hands it SIGTERM and returns its exit status. Without a terminal it is a plain exec.
"""

import os
import signal
import sys


def take_terminal() -> None:
    """Move into a process group of one's own and make it the terminal's foreground group."""
    if not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp():
        return
    # A stop by Ctrl-Z would leave the shell waiting for make, which does not stop.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.setpgid(0, 0)
    # The new group is a background one until tcsetpgrp returns, and SIGTTOU would stop it there.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)


if __name__ == "__main__":
    take_terminal()
    os.execv(sys.argv[1], sys.argv[1:])
