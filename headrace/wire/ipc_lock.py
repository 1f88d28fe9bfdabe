"""One owner for an ipc address: ZeroMQ itself takes a socket's path over without a word, so a lock file beside it says who has it.

The lock is the kernel's and dies with its holder, however that ends; a path left by a dead process is free at once.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from headrace.errors import ConfigError


class IpcLock:
    """Held from bind to close."""

    def __init__(self, address: str) -> None:
        """Take the address.

        Raises:
            ConfigError: Another process has it, or its directory is not to be written to.
        """
        self._socket_path = Path(address.removeprefix("ipc://"))
        self._path = self._socket_path.with_name(self._socket_path.name + ".lock")
        try:
            self._descriptor = self._open()
        except BlockingIOError as error:
            raise ConfigError(f"{address} is in use by another process: stop it, or set another run_directory") from error
        except OSError as error:
            raise ConfigError(f"{address} cannot be bound: {self._path}: {error.strerror}") from error

    def release(self) -> None:
        """Remove the socket's file and the lock's, in this order, and let go."""
        self._socket_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _open(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former holder may have removed the file between our open and our lock.
                if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
