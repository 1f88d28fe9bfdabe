"""Typed reading of a model directory's JSON files, and one clear line for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ModelError
from headrace.models.model_config import load_generation_defaults, load_model_config, load_tokenizer_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def write(directory: Path, name: str = "config.json", **values: Any) -> Path:
    (directory / name).write_text(json.dumps(values))
    return directory


def test_least_config_gets_the_format_s_defaults(tmp_path):
    config = load_model_config(write(tmp_path, **BASE))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias, config.hidden_act) == (False, False, False, "silu")
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert config.raw["vocab_size"] == 100


def test_explicit_values_are_read(tmp_path):
    more = {"num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1}
    config = load_model_config(write(tmp_path, **BASE, **more, eos_token_id=2, attention_bias=True))
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 32, 1e-5)
    assert (config.tie_word_embeddings, config.attention_bias) == (True, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("written", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e5}}, 1e5, LLAMA3),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0, None),
        ({"rope_scaling": None}, 1e4, None),
    ],
)
def test_rope_settings_are_read_from_the_old_and_the_new_place(written, theta, scaling, tmp_path):
    config = load_model_config(write(tmp_path, **BASE, **written))
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


def test_generation_config_leads_on_what_ends_an_answer(tmp_path):
    write(tmp_path, **BASE, eos_token_id=2)
    write(tmp_path, "generation_config.json", eos_token_id=[5, 6])
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    write(tmp_path, "generation_config.json", temperature=0.6)
    assert load_model_config(tmp_path).eos_token_ids == (2,)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing size": ({"vocab_size": None}, "vocab_size is missing"),
    "negative": ({"hidden_size": -1}, "hidden_size is -1"),
    "absurd": ({"vocab_size": 1 << 60}, "vocab_size is"),
    "text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "heads": ({"num_key_value_heads": 3}, "does not divide num_attention_heads 4"),
    "width": ({"num_attention_heads": 3}, "does not divide hidden_size 64"),
    "no architecture": ({"architectures": None}, "architectures is None"),
    "two architectures": ({"architectures": ["A", "B"]}, "list of one"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "theta": ({"rope_theta": "x"}, "rope_theta is 'x'"),
    "rope": ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
    "rope type": ({"rope_scaling": {"rope_type": 3}}, "rope_type 3"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    "act": ({"hidden_act": 4}, "hidden_act is 4"),
    "eos": ({"eos_token_id": 100}, "eos_token_id is 100"),
    "eos list": ({"eos_token_id": [1, "x"]}, "token ids from 0 to 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_value_is_named(case, tmp_path):
    values, message = BAD[case]
    with pytest.raises(ModelError, match=message) as caught:
        load_model_config(write(tmp_path, **{**BASE, **values}))
    assert "config.json" in str(caught.value)
    assert "pull the model again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_file_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        load_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_config_says_how_to_get_the_model(tmp_path):
    with pytest.raises(ModelError, match="headrace models pull"):
        load_model_config(tmp_path)


def test_generation_defaults_are_the_sampling_values_only(tmp_path):
    assert load_generation_defaults(tmp_path) == {}
    write(tmp_path, "generation_config.json", temperature=0.6, top_k=20, eos_token_id=2, transformers_version="5", top_p=None)
    assert load_generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    write(tmp_path, "generation_config.json", temperature="hot")
    with pytest.raises(ModelError, match="temperature is 'hot'"):
        load_generation_defaults(tmp_path)


def test_chat_template_of_its_own_file_leads(tmp_path):
    assert load_tokenizer_config(tmp_path).chat_template is None
    write(
        tmp_path, "tokenizer_config.json", chat_template="old", bos_token={"content": "<s>"}, eos_token="</s>", add_bos_token=True
    )
    config = load_tokenizer_config(tmp_path)
    assert config.chat_template == "old"
    assert config.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load_tokenizer_config(tmp_path).chat_template == "new"


def test_default_of_several_chat_templates_is_taken(tmp_path):
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_tokenizer_config(write(tmp_path, "tokenizer_config.json", chat_template=templates)).chat_template == "d"


def test_chat_template_that_is_not_text_is_refused(tmp_path):
    with pytest.raises(ModelError, match="chat_template"):
        load_tokenizer_config(write(tmp_path, "tokenizer_config.json", chat_template=5))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        load_tokenizer_config(tmp_path)
