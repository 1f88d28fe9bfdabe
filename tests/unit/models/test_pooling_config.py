"""How an encoder's directory says that vectors are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ModelError
from headrace.models.pooling_config import PoolingConfig, load_pooling_config


def write(directory: Path, modules: Any, pooling: dict[str, Any] | None = None) -> Path:
    (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


def modules(*kinds: str) -> list[dict[str, Any]]:
    return [{"idx": index, "path": f"{index}_{kind}" if index else "", "type": f"a.b.{kind}"} for index, kind in enumerate(kinds)]


def test_a_directory_that_says_nothing_means_the_mean(tmp_path: Path) -> None:
    assert load_pooling_config(tmp_path) == PoolingConfig("mean", is_normalized=False)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_the_pooling_of_sentence_transformers_is_read(pooling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config = load_pooling_config(write(tmp_path, modules("Transformer", "Pooling", "Normalize"), pooling))
    assert (config.pooling, config.is_normalized) == (expected, True)


@pytest.mark.parametrize(
    ("found", "pooling", "message"),
    [
        (modules("Transformer", "Dense"), None, "step 'Dense' is not supported; supported are Transformer, Pooling, Normalize"),
        (modules("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "'pooling_mode_max_tokens' is not supported"),
        (
            modules("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            r"\['pooling_mode_mean_tokens', 'pooling_mode_cls_token'\] is not supported",
        ),
        (modules("Transformer", "Pooling"), {}, r"pooling \[\] is not supported; supported: one of"),
        (modules("Transformer", "Pooling"), {"pooling_mode": "max"}, "'max' is not supported; supported: mean, cls, lasttoken"),
        (modules("Transformer", "Pooling"), None, "1_Pooling/config.json: missing"),
        ({"type": "Pooling"}, None, "is not a list of objects"),
        ([3], None, "is not a list of objects"),
    ],
)
def test_what_is_not_computed_is_refused(found: Any, pooling: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_pooling_config(write(tmp_path, found, pooling))
