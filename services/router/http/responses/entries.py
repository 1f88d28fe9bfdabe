"""Entries and their items in SQLite, bounded in number, bytes and time. Pure, and told the time.

An entry is a JSON object with an id, and owns items, in order. Those see it who ask with the key that it was kept with. When a new
entry does not fit any more, the oldest go first, whosever they are. All calls are blocking, and come from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from services.router.http.responses.items import Item
from services.router.key_column import VISIBLE, add_key_column
from services.router.private_files import open_database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, previous_id TEXT, conversation_id TEXT,
    created_s REAL NOT NULL, expires_s REAL NOT NULL, num_bytes INTEGER NOT NULL, body BLOB NOT NULL,
    key_name TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires_s, id, num_bytes);
CREATE TABLE IF NOT EXISTS items (
    owner TEXT NOT NULL REFERENCES entries (id) ON DELETE CASCADE, position INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (owner, position)
);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
"""


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """Bounds of what is remembered."""

    max_entries: int
    max_bytes: int
    ttl_s: float


class Entries:
    """A table of entries, and one of their items."""

    def __init__(self, path: str, limits: HistoryLimits) -> None:
        """`path` is a file's, or ":memory:"."""
        self._limits = limits
        self._db = open_database(path)
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)
        add_key_column(self._db, "entries")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def put(
        self,
        body: dict[str, Any],
        kind: str,
        items: Sequence[Item],
        *,
        key_name: str,
        status: str,
        now_s: float,
        previous_id: str | None = None,
        conversation_id: str | None = None,
    ) -> None:
        """Keep an entry, in place of one of the same id.

        Raises:
            RequestTooLargeError: It is larger than all that may be kept.
        """
        blob, blobs = orjson.dumps(body), [orjson.dumps(item) for item in items]
        num_bytes = len(blob) + sum(map(len, blobs))
        self._check_size(num_bytes)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("DELETE FROM entries WHERE id = ?", (body["id"],))
            self._make_room(num_bytes, 1, now_s, keep=conversation_id or "")
            expires_s = now_s + self._limits.ttl_s
            row = (body["id"], kind, status, previous_id, conversation_id, now_s, expires_s, num_bytes, blob, key_name)
            self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._insert_items(body["id"], 0, items, blobs)
            # What it gave is found by its ids too.
            output = body.get("output", ())
            self._insert_items(body["id"], -len(output), output, [orjson.dumps(item) for item in output])
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def body(self, entry_id: str, kind: str, now_s: float, *, key_name: str) -> dict[str, Any]:
        """An entry.

        Raises:
            NotFoundError: There is none of that id and kind that this key sees, or it has expired.
        """
        query = f"SELECT body FROM entries WHERE id = ? AND kind = ? AND expires_s > ? AND {VISIBLE}"
        row = self._db.execute(query, (entry_id, kind, now_s, key_name)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no {kind} {entry_id[:100]!r}; it may have expired", param=f"{kind}_id")
        found: dict[str, Any] = orjson.loads(row[0])
        return found

    def replace(self, body: dict[str, Any], status: str) -> None:
        """Another body for an entry that keeps its items."""
        self._db.execute("UPDATE entries SET status = ?, body = ? WHERE id = ?", (status, orjson.dumps(body), body["id"]))

    def delete(self, entry_id: str) -> None:
        """Forget an entry, with its items."""
        self._db.execute("DELETE FROM entries WHERE id = ?", (entry_id,))

    def items(self, owner: str) -> list[Item]:
        """What an entry owns, oldest first."""
        # Those before 0 are what it gave.
        rows = self._db.execute("SELECT body FROM items WHERE owner = ? AND position >= 0 ORDER BY position", (owner,))
        return [orjson.loads(body) for (body,) in rows]

    def item(self, item_id: str, now_s: float, *, key_name: str) -> Item:
        """An item of any entry that this key sees.

        Raises:
            InvalidRequestError: There is none of that id.
        """
        query = (
            f"SELECT items.body FROM items JOIN entries ON entries.id = owner WHERE items.id = ? AND expires_s > ? AND {VISIBLE}"
        )
        row = self._db.execute(query, (item_id, now_s, key_name)).fetchone()
        if row is None:
            raise InvalidRequestError(f"input refers to the item {item_id[:100]!r}, which is not kept", param="input")
        found: Item = orjson.loads(row[0])
        return found

    def append_items(self, owner: str, items: Sequence[Item], now_s: float) -> None:
        """Add items to an entry, which lives on for another `ttl_s`."""
        (last,) = self._db.execute("SELECT coalesce(max(position), -1) FROM items WHERE owner = ?", (owner,)).fetchone()
        blobs = [orjson.dumps(item) for item in items]
        added = sum(map(len, blobs))
        (held,) = self._db.execute("SELECT num_bytes FROM entries WHERE id = ?", (owner,)).fetchone()
        self._check_size(held + added)
        self._make_room(added, 0, now_s, keep=owner)
        self._insert_items(owner, last + 1, items, blobs)
        self._db.execute(
            "UPDATE entries SET num_bytes = num_bytes + ?, expires_s = ? WHERE id = ?",
            (added, now_s + self._limits.ttl_s, owner),
        )

    def delete_item(self, owner: str, item_id: str) -> bool:
        """Take an item from an entry; tells whether it was there."""
        return bool(self._db.execute("DELETE FROM items WHERE owner = ? AND id = ?", (owner, item_id)).rowcount)

    def _insert_items(self, owner: str, first: int, items: Sequence[Item], blobs: Sequence[bytes]) -> None:
        rows = [(owner, first + index, item["id"], blob) for index, (item, blob) in enumerate(zip(items, blobs, strict=True))]
        self._db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limits.max_bytes:
            limit = self._limits.max_bytes
            raise RequestTooLargeError(f"what is kept must be at most {limit} bytes (router.history_max_bytes); got {num_bytes}")

    def _make_room(self, num_bytes: int, num_entries: int, now_s: float, *, keep: str) -> None:
        """Forget what has expired, then the oldest, until so much more fits."""
        self._db.execute("DELETE FROM entries WHERE expires_s <= ?", (now_s,))
        count, held = self._db.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM entries").fetchone()
        while count + num_entries > self._limits.max_entries or held + num_bytes > self._limits.max_bytes:
            row = self._db.execute("SELECT id, num_bytes FROM entries WHERE id != ? ORDER BY expires_s LIMIT 1", (keep,)).fetchone()
            if row is None:
                return
            self._db.execute("DELETE FROM entries WHERE id = ?", (row[0],))
            count, held = count - 1, held - row[1]
