"""Files and batches: rows in SQLite, contents in files beside it. Told the time; all calls block, and come from one thread.

A file's content is there before its row, and its row goes before its content, so a row never names what is not there. What no row
names for a day is swept away.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from headrace.errors import InvalidRequestError, NotFoundError, OverloadedError, RequestFailedError
from services.router.key_column import VISIBLE, add_key_column
from services.router.private_files import make_private_directory, open_database

DATABASE = "batches.sqlite"
_ABANDONED_S = 86400
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, purpose TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    expires_s REAL, body BLOB NOT NULL, key_name TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL, input_file_id TEXT NOT NULL,
    tenant TEXT NOT NULL, body BLOB NOT NULL, key_name TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
"""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bounds of what is kept."""

    max_files: int
    max_total_bytes: int
    max_batches: int


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, and whether more follows."""

    rows: list[Row]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A batch to work off, whom its requests are counted to, and the key that its results are for."""

    batch: Row
    tenant: str
    key_name: str


class Database:
    """The two tables, and the directory."""

    def __init__(self, directory: Path) -> None:
        """Open, and make what is missing.

        Raises:
            RequestFailedError: The directory cannot be used; it names the setting.
        """
        self.directory = directory
        self.contents = directory / "files"
        try:
            # The directory is an operator's, who may share it; the contents are in one of our own.
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private_directory(self.contents)
            self.connection = open_database(str(directory / DATABASE))
            self.connection.executescript(_SCHEMA)
            for table in ("files", "batches"):
                add_key_column(self.connection, table)
        except (OSError, sqlite3.Error) as error:
            raise RequestFailedError(f"router.data_directory {directory} cannot be used ({error})") from error

    def page(
        self, table: str, where: str, values: Sequence[object], *, key_name: str, after: str | None, limit: int, is_ascending: bool
    ) -> Page:
        """Rows of a table that a key sees, in the order in which they came, or against it."""
        condition, arguments = f"({where}) AND {VISIBLE}", [*values, key_name]
        if after is not None:
            row = self.connection.execute(f"SELECT seq FROM {table} WHERE id = ? AND {VISIBLE}", (after, key_name)).fetchone()
            if row is None:
                raise InvalidRequestError(f"after must be the id of an entry of the list; got {after[:100]!r}", param="after")
            condition += f" AND seq {'>' if is_ascending else '<'} ?"
            arguments.append(row[0])
        order = "ASC" if is_ascending else "DESC"
        query = f"SELECT body FROM {table} WHERE {condition} ORDER BY seq {order} LIMIT ?"
        found = [orjson.loads(body) for (body,) in self.connection.execute(query, (*arguments, limit + 1))]
        return Page(found[:limit], len(found) > limit)


class Files:
    """Uploaded files, and those that batches made."""

    def __init__(self, database: Database, limits: FileLimits) -> None:
        self._database = database
        self._db = database.connection
        self._limits = limits

    def path(self, file_id: str) -> Path:
        """Where a file's content is."""
        return self._database.contents / file_id

    def begin(self, file_id: str) -> BinaryIO:
        """A file to write a new content into; `add` makes it known, `discard` drops it."""
        return self.path(file_id).open("xb")

    def discard(self, file_id: str) -> None:
        """Drop a content that no row names."""
        self.path(file_id).unlink(missing_ok=True)

    def check_room(self, now_s: float, num_bytes: int = 0) -> None:
        """Refuse a file that does not fit; what has expired goes first.

        Raises:
            OverloadedError: There are too many, or they are too large together.
        """
        self.sweep(now_s)
        self.sweep_contents(now_s)
        count, held = self._db.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM files").fetchone()
        if count >= self._limits.max_files:
            raise OverloadedError(f"{count} files are kept, the limit router.max_files; delete some", retry_after_s=60)
        if held + num_bytes > self._limits.max_total_bytes:
            limit = self._limits.max_total_bytes
            raise OverloadedError(
                f"files of {held} bytes are kept, {num_bytes} more are over the limit router.files_max_bytes, {limit}; delete some",
                retry_after_s=60,
            )

    def add(self, body: Row, *, key_name: str) -> None:
        """Make a content that is there known, to those who ask with this key."""
        with self.path(body["id"]).open("rb") as content:
            os.fsync(content.fileno())
        row = (body["id"], body["purpose"], body["bytes"], body["expires_at"], orjson.dumps(body), key_name)
        self._db.execute("INSERT INTO files (id, purpose, num_bytes, expires_s, body, key_name) VALUES (?, ?, ?, ?, ?, ?)", row)

    def replace(self, body: Row, *, key_name: str) -> None:
        """The same for a content that may be known already."""
        self._db.execute("DELETE FROM files WHERE id = ?", (body["id"],))
        self.add(body, key_name=key_name)

    def get(self, file_id: str, now_s: float, *, key_name: str) -> Row:
        """A file's object.

        Raises:
            NotFoundError: There is none of that id that this key sees, or it has expired.
        """
        query = f"SELECT body FROM files WHERE id = ? AND (expires_s IS NULL OR expires_s > ?) AND {VISIBLE}"
        row = self._db.execute(query, (file_id, now_s, key_name)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no file {file_id[:100]!r}; it may have expired", param="file_id")
        found: Row = orjson.loads(row[0])
        return found

    def read(self, file_id: str, offset: int, num_bytes: int) -> bytes:
        """A part of a file's content."""
        try:
            with self.path(file_id).open("rb") as content:
                content.seek(offset)
                return content.read(num_bytes)
        except FileNotFoundError:
            raise NotFoundError(f"the file {file_id[:100]!r} was deleted", param="file_id") from None

    def page(self, now_s: float, *, key_name: str, purpose: str | None, after: str | None, limit: int, is_ascending: bool) -> Page:
        """A part of the list of the files that a key sees."""
        where = "(expires_s IS NULL OR expires_s > ?)"
        arguments: list[object] = [now_s]
        if purpose is not None:
            where += " AND purpose = ?"
            arguments.append(purpose)
        return self._database.page(
            "files", where, arguments, key_name=key_name, after=after, limit=limit, is_ascending=is_ascending
        )

    def delete(self, file_id: str, now_s: float, *, key_name: str) -> None:
        """Forget a file.

        Raises:
            InvalidRequestError: A batch that is not finished needs it.
        """
        self.get(file_id, now_s, key_name=key_name)
        marks = ", ".join("?" * len(UNFINISHED))
        query = f"SELECT id, key_name FROM batches WHERE input_file_id = ? AND status IN ({marks})"
        row = self._db.execute(query, (file_id, *UNFINISHED)).fetchone()
        if row is not None:
            # Everybody's file may be the input of a batch that this key does not see.
            name = row[0] if row[1] in ("", key_name) else "a batch"
            raise InvalidRequestError(
                f"the file {file_id} is the input of {name}, which is not finished: cancel that first", param="file_id"
            )
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.discard(file_id)

    def sweep(self, now_s: float) -> None:
        """Forget what has expired.

        What a batch that is not finished still reads goes after it; nobody sees it any more.
        """
        marks = ", ".join("?" * len(UNFINISHED))
        query = (
            f"SELECT id FROM files WHERE expires_s <= ? AND id NOT IN (SELECT input_file_id FROM batches WHERE status IN ({marks}))"
        )
        for (file_id,) in self._db.execute(query, (now_s, *UNFINISHED)).fetchall():
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
            self.discard(file_id)

    def sweep_contents(self, now_s: float) -> None:
        """Drop contents that no row names and nobody has written to for a day: uploads that a death broke off."""
        known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
        for path in self._database.contents.iterdir():
            if path.name not in known and path.stat().st_mtime < now_s - _ABANDONED_S:
                path.unlink(missing_ok=True)


class Batches:
    """Batches by their ids."""

    def __init__(self, database: Database, limits: FileLimits) -> None:
        self._database = database
        self._db = database.connection
        self._limits = limits

    def add(self, body: Row, tenant: str, *, key_name: str) -> None:
        """Keep a new batch; a finished one goes where there are too many.

        Args:
            body: The batch's object.
            tenant: Whom its requests are counted to.
            key_name: Of the key that sees it, and its results.

        Raises:
            OverloadedError: Too many are not finished.
        """
        marks = ", ".join("?" * len(UNFINISHED))
        (count,) = self._db.execute(f"SELECT count(*) FROM batches WHERE status IN ({marks})", UNFINISHED).fetchone()
        if count >= self._limits.max_batches:
            raise OverloadedError(f"{count} batches are not finished, the limit router.max_batches; retry later", retry_after_s=60)
        row = (body["id"], body["status"], body["input_file_id"], tenant, orjson.dumps(body), key_name)
        self._db.execute("INSERT INTO batches (id, status, input_file_id, tenant, body, key_name) VALUES (?, ?, ?, ?, ?, ?)", row)
        query = f"DELETE FROM batches WHERE status NOT IN ({marks}) AND seq <= (SELECT max(seq) FROM batches) - ?"
        self._db.execute(query, (*UNFINISHED, self._limits.max_files))

    def get(self, batch_id: str, *, key_name: str) -> Row:
        """A batch's object.

        Raises:
            NotFoundError: There is none of that id that this key sees.
        """
        row = self._db.execute(f"SELECT body FROM batches WHERE id = ? AND {VISIBLE}", (batch_id, key_name)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no batch {batch_id[:100]!r}", param="batch_id")
        found: Row = orjson.loads(row[0])
        return found

    def update(self, body: Row) -> None:
        """Keep a batch as it stands now. One that is being cancelled stays so until it is finished."""
        query = "UPDATE batches SET status = ?, body = ? WHERE id = ?"
        if body["status"] in ("validating", "in_progress", "finalizing"):
            query += " AND status != 'cancelling'"
        self._db.execute(query, (body["status"], orjson.dumps(body), body["id"]))

    def page(self, *, key_name: str, after: str | None, limit: int) -> Page:
        """A part of the list of the batches that a key sees, the newest first."""
        return self._database.page("batches", "1", (), key_name=key_name, after=after, limit=limit, is_ascending=False)

    def next_unfinished(self) -> Unfinished | None:
        """The oldest batch that is not finished, whoever made it."""
        marks = ", ".join("?" * len(UNFINISHED))
        query = f"SELECT body, tenant, key_name FROM batches WHERE status IN ({marks}) ORDER BY seq LIMIT 1"
        row = self._db.execute(query, UNFINISHED).fetchone()
        return None if row is None else Unfinished(orjson.loads(row[0]), tenant=row[1], key_name=row[2])


class Storage:
    """Both, over one directory."""

    def __init__(self, directory: Path, limits: FileLimits) -> None:
        self.database = Database(directory)
        self.files = Files(self.database, limits)
        self.batches = Batches(self.database, limits)

    def close(self) -> None:
        """Close the database."""
        self.database.connection.close()
