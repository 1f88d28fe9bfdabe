"""The paths of every protocol that has files of its own, and what they keep, over one engine. Part of the shell."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ConfigError
from services.router.generation import Engine
from services.router.http.anthropic_routes import AnthropicRoutes
from services.router.http.batches.opening import OpeningStorage
from services.router.http.batches.routes import BatchesRoutes, FilesRoutes
from services.router.http.batches.runner import BatchRunner, BatchSettings
from services.router.http.batches.storage import FileLimits
from services.router.http.describing import DescribingRoutes
from services.router.http.embeddings_routes import EmbeddingsRoutes
from services.router.http.exchange import Application
from services.router.http.generate_routes import GenerateRoutes
from services.router.http.ollama_routes import OllamaRoutes
from services.router.http.responses.entries import HistoryLimits
from services.router.http.responses.history import History
from services.router.http.responses.routes import ConversationsRoutes, ResponsesRoutes
from services.router.http.routing import Route
from services.router.private_files import MEMORY
from services.router.storage_thread import StorageThread

HISTORY_FILE = "history.sqlite"


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """Where and how much is kept. `history_path` is a file's, or ":memory:"."""

    history_path: str
    history: HistoryLimits
    directory: Path
    files: FileLimits
    max_file_bytes: int
    batches: BatchSettings


class Protocols:
    """Routes for `HttpApp`, with a life: begun before the port opens, ended after it closes."""

    def __init__(self, engine: Engine, storage: StorageSettings) -> None:
        self._history_thread = StorageThread("the history of responses")
        self._history = _open_history(storage)
        self._stateless = [
            *EmbeddingsRoutes(engine).routes(),
            *GenerateRoutes(engine).routes(),
            *AnthropicRoutes(engine).routes(),
            *OllamaRoutes(engine).routes(),
            *DescribingRoutes().routes(),
        ]
        self._responses = ResponsesRoutes(engine, self._history, self._history_thread)
        self._conversations = ConversationsRoutes(self._history, self._history_thread)
        self._storage = OpeningStorage(storage.directory, storage.files)
        self._runner = BatchRunner(self._storage, storage.batches, lambda: engine.num_online_requests)
        self._files = FilesRoutes(self._storage, max_file_bytes=storage.max_file_bytes)
        self._batches = BatchesRoutes(self._storage, self._runner)

    def routes(self) -> list[Route]:
        """All paths."""
        return [
            *self._stateless,
            *self._responses.routes(),
            *self._conversations.routes(),
            *self._files.routes(),
            *self._batches.routes(),
        ]

    async def start(self, app: Application) -> None:
        """Take up what a former life left; `app` is who is asked the requests of batches."""
        await self._responses.start()
        self._runner.start(app)

    async def stop(self) -> None:
        """Keep what must be kept, and close the files."""
        await self._runner.stop()
        await self._responses.stop()
        self._storage.close()
        self._history_thread.close()
        self._history.close()


def _open_history(storage: StorageSettings) -> History:
    """The history, in its file or in memory.

    Raises:
        ConfigError: The file cannot be used; the message names the settings.
    """
    try:
        if storage.history_path != MEMORY:
            # One that is there stays as its owner made it: what we put in is private by itself.
            Path(storage.history_path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return History(storage.history_path, storage.history)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"router.history is sqlite, and {storage.history_path} cannot be used ({error}): move it away, or set "
            "router.data_directory to another directory",
            param="router.data_directory",
        ) from error
