"""The column that says whose a stored row is: the name of the API key that it was stored with. Pure.

A row without a key was stored while none were asked for, or by a version that did not note it: everybody sees it, as before. Where
no keys are asked for, the asker's name is empty too, and what was stored with a key stays unseen.
"""

from __future__ import annotations

import sqlite3
from typing import Final

VISIBLE: Final = "key_name IN ('', ?)"
"""Condition on rows that the asker may see; its value is the name of the asker's key."""


def add_key_column(connection: sqlite3.Connection, table: str) -> None:
    """Give a table the column where a file of an earlier version lacks it; its rows are everybody's.

    Two processes may open the same file at once: one of them adds it.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if "key_name" not in {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN key_name TEXT NOT NULL DEFAULT ''")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
