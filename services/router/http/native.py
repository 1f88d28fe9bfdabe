"""Answers of our own small endpoints: /health, /ready, /tokenize, /detokenize, /flush_cache. Pure."""

from __future__ import annotations

import orjson

from services.router.generation import EncodedPrompt


def health(stages: dict[str, object]) -> bytes:
    """The process lives: this is what it knows of every stage."""
    return orjson.dumps({"status": "alive", **stages})


def readiness(reason: str | None) -> bytes:
    """Whether a request could be served now, and what is missing otherwise."""
    return orjson.dumps({"ready": reason is None, "reason": reason})


def tokens(answer: EncodedPrompt) -> bytes:
    """Answer of POST /tokenize, in vLLM's shape."""
    return orjson.dumps(
        {"count": int(answer.token_ids.size), "max_model_len": answer.max_model_len, "tokens": answer.token_ids},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def flushed(num_pages: int) -> bytes:
    """Answer of POST /flush_cache."""
    return orjson.dumps({"num_pages": num_pages})


def text(prompt: str) -> bytes:
    """Answer of POST /detokenize, in vLLM's shape."""
    return orjson.dumps({"prompt": prompt})
