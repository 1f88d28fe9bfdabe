"""With asyncio: streams a chat, cancels another one half-way, and shows the trace ids.

python clients/python/examples/stream_a_chat_async.py [HOST:PORT]
"""

from __future__ import annotations

import asyncio
import sys

from headrace_client import AsyncClient, user


async def main(target: str) -> None:
    """Ask twice."""
    async with AsyncClient(target, timeout_s=60) as client:
        question = [user("What is the capital of Japan?")]
        async with client.stream_chat(question, temperature=0, max_tokens=32) as stream:
            async for piece in stream:
                print(piece.text, end="", flush=True)
        print(f"\n[trace {stream.trace_id}, request {stream.request_id}]")

        num_pieces = 0
        async with client.stream_chat([user("Tell a very long story.")], max_tokens=1000, ignore_eos=True) as stream:
            async for piece in stream:
                num_pieces += 1
                print(piece.text, end="", flush=True)
                if num_pieces == 10:
                    stream.cancel()
                    break
        print(f"\n[cancelled after {num_pieces} pieces, trace {stream.trace_id}]")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"))
