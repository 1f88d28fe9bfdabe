"""From a model directory to a runner that embeds."""

from __future__ import annotations

import torch

from headrace.models.embedding_config import EmbeddingConfig
from services.worker.batch_inputs import Limits
from services.worker.embed_runner import EmbedRunner
from services.worker.loading import LoadOptions, load_embedder


def load_embed_runner(options: LoadOptions, vectors: EmbeddingConfig, *, cpu_flags: frozenset[str]) -> EmbedRunner:
    """Load an encoder and make a runner for it, not yet warm.

    Args:
        options: Settings; those that size pages are not looked at.
        vectors: What its directory says of its vectors.
        cpu_flags: What the CPU can do.

    Raises:
        ModelError: The directory cannot be used.
        ConfigError: The settings do not fit the model.
    """
    torch.set_num_threads(options.num_threads)
    embedder = load_embedder(options, cpu_flags=cpu_flags)
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=embedder.limits.max_model_len,
        num_pages=0,
        page_size=options.page_size,
        vocab_size=embedder.limits.vocab_size,
    )
    return EmbedRunner(embedder, limits, vectors)
