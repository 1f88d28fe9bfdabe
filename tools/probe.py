"""A container's health check: exits 0 when a service's port answers 200 for a path. `python -IS probe.py 9101 /ready`

Raw sockets only: it runs every few seconds in every container, and a start without site packages costs a third of one with.
"""

import socket
import sys


def probe(port: int, path: str) -> str:
    """Return the status line and body of one GET on this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer.decode(errors="replace")


if __name__ == "__main__":
    reply = probe(int(sys.argv[1]), sys.argv[2])
    print(reply)
    sys.exit(0 if reply.split(" ", 2)[1:2] == ["200"] else 1)
