"""transformers' own model with the very weights of a model directory, in float32: what ours is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from headrace.models.weights import open_weights


def load_reference(directory: Path) -> transformers.LlamaForCausalLM:
    """The Llama model of a directory in Hugging Face layout, its weights read by our own reader."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(directory))
    weights = open_weights(directory)
    state = {name: torch.from_numpy(weights.load(name)).float() for name in weights.names()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model.float().eval()


class TieJudge:
    """Says how near two answers to one chat were where they part."""

    def __init__(self, directory: Path) -> None:
        self._model = load_reference(directory)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def gap(self, messages: list[dict[str, Any]], first: str, second: str) -> float:
        """Float32 logits apart, of the two tokens at which the answers part; 0 when the texts are the same."""
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        # An answer that ends earlier ended with its end-of-sequence token.
        answers = [
            [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id] for text in (first, second)
        ]
        parted = next((index for index, pair in enumerate(zip(*answers, strict=False)) if pair[0] != pair[1]), None)
        if parted is None:
            return 0.0
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt_ids + answers[0][:parted]])).logits[0, -1]
        return abs(float(logits[answers[0][parted]] - logits[answers[1][parted]]))
