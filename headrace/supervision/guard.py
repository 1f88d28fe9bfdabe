"""The guard: a tiny process that outlives a supervisor killed with SIGKILL, and then leaves nothing of its tree.

Why a process: whatever lives in a child can be killed before it acts (PR_SET_PDEATHSIG strikes first), and a grandchild such
as `sleep` has neither lifeline nor parent death signal. Why one for the whole tree and not one a group: it needs only to know
who belongs to the tree, which the mark in every environment tells (headrace/supervision/process_table.py), also for a child
that was being spawned in that very moment or a daemon that left its group; and one interpreter without site packages costs
about 9.7 MB resident of which 3.6 MB are its own (Python 3.11), five would cost five times that. Sessions of children are told
to it besides, for programs that write over their environment. Why a session of its own: a Ctrl-C or a kill of the
supervisor's group must not reach it.

Protocol on its socket: it sends `.` when it stands; it reads lines `+<session>`, `-<session>` and `quit`. End of file without
`quit` means that the supervisor is dead. Started by headrace/supervision/guard_handle.py; imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from headrace.supervision.process_table import ProcessEntry, descendants, kill_entry, read_marks, read_table

_QUIET_S = 0.6
_GIVE_UP_S = 20.0
_POLL_S = 0.02


def main(arguments: list[str]) -> None:
    """Stand guard until the supervisor says `quit` or is gone.

    Args:
        arguments: Socket descriptor, the supervisor's pid, its token, its run directory or an empty string.
    """
    socket_fd, supervisor_pid, token, run_directory = int(arguments[0]), int(arguments[1]), arguments[2], arguments[3]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    sessions = _stand_by(socket_fd)
    if sessions is None:
        return
    killed = _kill_tree(token, sessions)
    if run_directory:
        # Imported only now: while it stands by, the guard stays small.
        from headrace.supervision.run_directory import remove_run_directory_of

        remove_run_directory_of(run_directory, supervisor_pid)
    names = ", ".join(sorted({entry.name for entry in killed.values()})) or "none"
    message = f"headrace: supervisor {supervisor_pid} is gone; its guard killed {len(killed)} processes left behind ({names})\n"
    try:
        os.write(2, message.encode())
    except OSError:
        # Whoever read our stderr may have gone with the supervisor; there is no one left to tell.
        return


def _stand_by(socket_fd: int) -> set[int] | None:
    """Follow the supervisor's messages; the open sessions when it is gone, or None when it sent us away."""
    sessions: set[int] = set()
    rest = b""
    try:
        os.write(socket_fd, b".")
    except BrokenPipeError:
        # Gone already, while this guard started in the place of one that was killed.
        return sessions
    while True:
        try:
            data = os.read(socket_fd, 4096)
        except ConnectionResetError:
            data = b""
        if not data:
            return sessions
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"quit":
                return None
            number = int(line[1:])
            sessions.add(number) if line.startswith(b"+") else sessions.discard(number)


def _kill_tree(token: str, sessions: set[int]) -> dict[int, ProcessEntry]:
    """Kill all that belongs to the tree until none was seen for a while; returns what was killed.

    A child between fork and exec shows no mark yet, hence the quiet time: whatever was under way has surfaced by then.
    """
    killed: dict[int, ProcessEntry] = {}
    begin = last_seen = time.monotonic()
    while (now := time.monotonic()) - last_seen < _QUIET_S and now - begin < _GIVE_UP_S:
        members = find_members(token, sessions)
        for entry in members:
            kill_entry(entry)
            killed[entry.pid] = entry
        if members:
            last_seen = now
        time.sleep(_POLL_S)
    return killed


def find_members(token: str, sessions: set[int]) -> list[ProcessEntry]:
    """Every live process of the tree of `token`, the guard itself left out.

    Sessions of members are added to `sessions`: they are the members' own, as each child is spawned into a new one.
    """
    table = read_table()
    own_pid = os.getpid()
    prefix = f"{token}:"
    marked = {pid for pid in table if pid != own_pid and any(mark.startswith(prefix) for mark in read_marks(pid))}
    sessions.update(table[pid].session_id for pid in marked)
    members = marked | {entry.pid for entry in table.values() if entry.session_id in sessions or entry.pgid in sessions}
    members |= descendants(table, members)
    members.discard(own_pid)
    return [table[pid] for pid in sorted(members) if table[pid].is_alive]


if __name__ == "__main__":
    main(sys.argv[1:])
