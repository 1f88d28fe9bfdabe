"""Goal: the GPU's path serves, from HTTP to kernels and back, on a machine without a GPU. Method: a tiny random checkpoint, served
once by Triton's kernels under their interpreter and once by torch, both in float32.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

PROMPTS = ("The mill stands by", "Water comes through the channel and then it turns")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, default_model_directory: Path) -> Path:
    """Qwen 3's shape, whose queries and keys are normed, with the default model's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = json.loads((default_model_directory / "tokenizer.json").read_text())
    torch.manual_seed(11)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer["model"]["vocab"]),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (default_model_directory / name).exists():
            shutil.copy(default_model_directory / name, directory / name)
    return directory


def ask(server: Server, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{server.http}/v1/completions", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        text: str = json.loads(response.read())["choices"][0]["text"]
    return text


def serve(model: Path, attention_backend: str) -> tuple[list[str], dict[str, Any]]:
    """Answers to the prompts, and what the worker said of its model."""
    settings = {
        "model_name": str(model),
        "worker_device": "cpu",
        "worker_attention_backend": attention_backend,
        "worker_dtype": "float32",
        "worker_standby": "false",
        "worker_max_num_seqs": "4",
        "worker_kv_cache_tokens": "256",
    }
    with Server(model.parent, **settings) as server:
        answers = [ask(server, model.name, prompt) for prompt in PROMPTS]
        lines = server.stderr_file.read_text(errors="replace").splitlines()
    (loaded,) = (json.loads(line) for line in lines if '"model.loaded"' in line)
    return answers, loaded


def test_served_by_triton_under_its_interpreter_the_greedy_answers_are_those_of_torch(tiny_model: Path) -> None:
    answers, loaded = serve(tiny_model, "triton")
    assert loaded["backend"] == "triton"
    expected, plain = serve(tiny_model, "torch")
    assert plain["backend"] == "torch"
    assert all(expected)
    assert answers == expected
