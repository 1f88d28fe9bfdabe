"""The gRPC server over a scripted engine, for the tests of the clients."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from services.router.api_keys import ApiKeys
from services.router.grpc.server import GrpcServer, Security, register_inference
from tests.patience import WAIT_S
from tests.unit.router.fake_engine import FakeEngine


class Served:
    """A server on a thread of its own: the synchronous client blocks the one it is called on."""

    def __init__(self, keys: ApiKeys | None = None) -> None:
        self.engine = FakeEngine()
        self._keys = keys
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server: GrpcServer = self._do(self._start())
        self.target = f"127.0.0.1:{self.server.port}"

    async def _start(self) -> GrpcServer:
        security = Security(self._keys or ApiKeys())
        server = GrpcServer(
            self.engine, register_inference, host="127.0.0.1", port=0, setting="x", max_message_bytes=10_000, security=security
        )
        await server.start()
        return server

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def stop(self) -> None:
        self._do(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()
