"""Goal: an encoder's vectors are those that transformers and sentence-transformers would give. Method: tiny random BERTs, rows of
odd lengths side by side, each compared with the row alone in transformers, pooled here by the definition.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.errors import InvalidRequestError, ModelError
from services.worker.loading import LoadOptions, load_embedder, load_runner
from tests.parity.families import roughen

LENGTHS = (5, 1, 17, 40, 1)


@pytest.fixture
def make_bert(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Write a random checkpoint; gives its directory and transformers' model of it."""

    def make(**changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(7)
        shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.BertConfig(**(shape | {"max_position_embeddings": 40, "initializer_range": 0.2} | changes))
        model = transformers.BertModel(config, add_pooling_layer=True).eval()
        roughen(model)
        model.save_pretrained(tmp_path)
        return tmp_path, model

    return make


def options(directory: Path, **changes: Any) -> LoadOptions:
    values: dict[str, Any] = {
        "directory": directory,
        "backend": "torch",
        "num_threads": 1,
        "dtype": "float32",
        "max_model_len": None,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "page_size": 8,
        "kv_cache_bytes": 1 << 20,
        "kv_cache_tokens": None,
    }
    return LoadOptions(**(values | changes))


def say_pooling(directory: Path, key: str, *, normalized: bool) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalized else [])]
    listed = [
        {"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"} for index, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, key: True}))


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pooling_mode_mean_tokens": lambda hidden: hidden.mean(0),
    "pooling_mode_cls_token": lambda hidden: hidden[0],
    "pooling_mode_lasttoken": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("key", POOLINGS)
def test_vectors_of_rows_side_by_side_are_those_of_transformers(
    key: str, normalized: bool, make_bert: Callable[..., tuple[Path, Any]]
) -> None:
    directory, model = make_bert()
    say_pooling(directory, key, normalized=normalized)
    embedder = load_embedder(options(directory), cpu_flags=frozenset())
    rows = [np.random.default_rng(length).integers(0, 97, length, dtype=np.int32) for length in LENGTHS]
    ours = embedder.embed(np.concatenate(rows), LENGTHS)
    assert ours.dtype == np.float32
    for row, vector in zip(rows, ours, strict=True):
        with torch.inference_mode():
            expected = POOLINGS[key](model(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0])
        if normalized:
            expected = expected / expected.norm()
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-5)


def test_other_activations_and_bfloat16_stay_near(make_bert: Callable[..., tuple[Path, Any]]) -> None:
    directory, model = make_bert(hidden_act="relu")
    row = np.arange(30, dtype=np.int32)
    with torch.inference_mode():
        expected = model(torch.arange(30)[None]).last_hidden_state[0].mean(0)
    exact = load_embedder(options(directory), cpu_flags=frozenset()).embed(row, [30])[0]
    np.testing.assert_allclose(exact, expected.numpy(), atol=2e-5)
    rounded = load_embedder(options(directory, dtype="bfloat16"), cpu_flags=frozenset()).embed(row, [30])[0]
    assert float(np.abs(rounded - exact).mean()) < 0.02 * float(exact.std())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([0] * 41, [41]), "a row has 41 tokens; 1 to 40"),
        (([0, 1], [2, 0]), "a row has 0 tokens"),
        (([97], [1]), "not from 0 to 96"),
        (([0, 1], [1]), "rows have 1 tokens, 2 came"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, message: str, make_bert: Callable[..., tuple[Path, Any]]) -> None:
    embedder = load_embedder(options(make_bert()[0]), cpu_flags=frozenset())
    token_ids, lengths = rows
    with pytest.raises(InvalidRequestError, match=message):
        embedder.embed(np.array(token_ids, dtype=np.int32), lengths)
    assert embedder.embed(np.zeros(0, dtype=np.int32), []).shape == (0, 0)


def test_an_encoder_does_not_generate(make_bert: Callable[..., tuple[Path, Any]]) -> None:
    with pytest.raises(ModelError, match="'BertModel' gives vectors, and text is to be generated"):
        load_runner(options(make_bert()[0]), cpu_flags=frozenset(), available_bytes=lambda: 1 << 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"is_decoder": True}, "is_decoder True is not supported"), ({"hidden_act": "mish"}, "'mish' is not supported")],
)
def test_what_an_encoder_does_not_compute_is_refused(
    changes: dict[str, Any], message: str, make_bert: Callable[..., tuple[Path, Any]]
) -> None:
    directory, _ = make_bert()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        load_embedder(options(directory), cpu_flags=frozenset())
