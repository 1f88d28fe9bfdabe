"""The supervisor's end of a child's notification channel: reads what the child says, without ever waiting for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from headrace.errors import ProtocolError
from headrace.supervision.notification import NOTIFICATION_SIZE_MAX_BYTES, Notification, decode_notification

log = structlog.get_logger(__name__)

OnChange = Callable[[], None]

_NUM_READ_AT_ONCE_MAX = 64


class NotifyChannel:
    """Collects the notifications of one life of a child."""

    def __init__(self, channel: socket.socket, *, name: str, on_change: OnChange) -> None:
        self._channel = channel
        self._name = name
        self._on_change = on_change
        self._notifications: list[Notification] = []
        self._loop = asyncio.get_running_loop()
        channel.setblocking(False)
        self._loop.add_reader(channel.fileno(), self._on_readable)

    def take(self) -> list[Notification]:
        """What the child has said since the last call, including what still waits in the socket."""
        self._read()
        taken, self._notifications = self._notifications, []
        return taken

    def close(self) -> None:
        """Stop listening. A second call does nothing."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()

    def _on_readable(self) -> None:
        self._read()
        if self._notifications:
            self._on_change()

    def _read(self) -> None:
        for _ in range(_NUM_READ_AT_ONCE_MAX):
            if self._channel.fileno() < 0:
                return
            try:
                data = self._channel.recv(NOTIFICATION_SIZE_MAX_BYTES + 1)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                # The child closed its end; from here only its exit is news.
                self.close()
                return
            try:
                self._notifications.append(decode_notification(data))
            except ProtocolError as error:
                log.warning("process.notification_rejected", process=self._name, error=error.message)
