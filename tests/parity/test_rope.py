"""Goal: rotary tables are those of transformers for every rope type. Method: its own module, over all positions of one length.

`dynamic` and `longrope` depend on the length in both; ours is `model.max_model_len`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from headrace.models.model_config import load_model_config
from services.worker.layers.rotary import rotary_tables
from tests.parity.families import SHAPE, Family, assert_near, make_checkpoint, rope

CONTEXT = 256
DIVISORS = {"short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [1.0 + 1.5 * pair for pair in range(8)]}

ORIGIN = {"original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGIN}
YARN_BETAS = {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.9}

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "default": (rope("default"), CONTEXT),
    "partial": (rope("default", partial_rotary_factor=0.5), CONTEXT),
    "other theta": (rope("default", rope_theta=1e6), CONTEXT),
    "linear": (rope("linear", factor=4.0), CONTEXT),
    "dynamic, short": (rope("dynamic", factor=4.0), CONTEXT),
    "dynamic, long": (rope("dynamic", factor=4.0), 1000),
    "llama3": (rope("llama3", **LLAMA3), CONTEXT),
    "yarn": (rope("yarn", factor=4.0, **ORIGIN), CONTEXT),
    "yarn past the context": (rope("yarn", factor=8.0, **ORIGIN), 512),
    "yarn, all parameters": (rope("yarn", factor=4.0, **ORIGIN, **YARN_BETAS), CONTEXT),
    "yarn, attention factor": (rope("yarn", factor=4.0, **ORIGIN, attention_factor=1.3), CONTEXT),
    "longrope, short": (rope("longrope", **ORIGIN, **DIVISORS), 64),
    "longrope, long": (rope("longrope", **ORIGIN, **DIVISORS), 65),
    "longrope, factor": (rope("longrope", factor=16.0, **ORIGIN, **DIVISORS), CONTEXT),
    "longrope, attention factor": (rope("longrope", attention_factor=1.5, **ORIGIN, **DIVISORS), CONTEXT),
}


@pytest.mark.parametrize("name", CASES)
def test_tables_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    parameters, length = CASES[name]
    written = SHAPE | parameters | {"architectures": ["LlamaForCausalLM"]}
    config = transformers.LlamaConfig(**json.loads(json.dumps(SHAPE | parameters)))
    (tmp_path / "config.json").write_text(json.dumps(written))
    # Of all that transformers has, Phi's module knows partial rotation as well.
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length).unsqueeze(0))
    ours = load_model_config(tmp_path)
    tables = rotary_tables(ours.rope, head_dim=ours.head_dim, context=CONTEXT, max_position=length)
    num_pairs = tables.cos.shape[1]
    assert length <= max(ours.max_model_len, CONTEXT)
    torch.testing.assert_close(tables.cos, cos[0, :, :num_pairs], atol=2e-5, rtol=0)
    torch.testing.assert_close(tables.sin, sin[0, :, :num_pairs], atol=2e-5, rtol=0)
    assert cos.shape[-1] == 2 * num_pairs


@pytest.mark.parametrize(
    ("family", "length"),
    [
        (Family("LlamaConfig", rope("dynamic", factor=4.0) | {"max_position_embeddings": 48}), 100),
        (Family("LlamaConfig", rope("dynamic", factor=4.0) | {"max_position_embeddings": 48}), 40),
        (Family("Phi3Config", rope("longrope", **DIVISORS) | {"original_max_position_embeddings": 48}), 100),
        (Family("Phi3Config", rope("longrope", **DIVISORS) | {"original_max_position_embeddings": 48}), 40),
    ],
    ids=["dynamic long", "dynamic short", "longrope long", "longrope short"],
)
def test_a_sequence_as_long_as_the_worker_allows_computes_as_in_transformers(
    family: Family, length: int, backend: str, tmp_path: Path, make_driver: Callable[..., Any]
) -> None:
    model = make_checkpoint(family, tmp_path)
    driver = make_driver(tmp_path, backend=backend, max_model_len=length)
    prompt = torch.randint(0, 251, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    driver.enter(0, prompt)
    driver.step({0: length - 9})
    _, logits = driver.step({0: 9})
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1]
    assert_near(backend, logits[0], theirs)
