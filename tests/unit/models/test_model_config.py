"""Typed reading of a model directory's JSON files, and one clear line for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ModelError
from headrace.models.model_config import RopeConfig, load_generation_defaults, load_model_config, load_tokenizer_config

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
    assert (config.rms_norm_eps, config.rope, config.ropes_by_layer_type) == (1e-6, RopeConfig(10000.0), {})
    assert config.tie_word_embeddings is False
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert config.fields.raw["vocab_size"] == 100


def test_explicit_values_are_read(tmp_path):
    more = {"num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1}
    config = load_model_config(write(tmp_path, **BASE, **more, eos_token_id=2))
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 32, 1e-5)
    assert config.tie_word_embeddings is True
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeConfig(5e5, scaling=LLAMA3)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(1e4, scaling=LINEAR)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, RopeConfig(1e5)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e5}}, RopeConfig(1e5, scaling=LLAMA3)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, RopeConfig(7.0)),
        ({"rope_scaling": None}, RopeConfig(1e4)),
        ({"partial_rotary_factor": 0.75}, RopeConfig(1e4, 0.75)),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, RopeConfig(1e4, 0.5)),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, RopeConfig(1e4, scaling=YARN)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
            RopeConfig(1e4, scaling=YARN | {"original_max_position_embeddings": 32}),
        ),
    ],
)
def test_rope_settings_are_read_from_the_old_and_the_new_place(written, expected, tmp_path):
    assert load_model_config(write(tmp_path, **BASE, **written)).rope == expected


def test_rope_settings_by_layer_type_are_told_apart(tmp_path):
    written = {"full_attention": {**LINEAR, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = load_model_config(write(tmp_path, **BASE, rope_parameters=written))
    assert config.ropes_by_layer_type == {"full_attention": RopeConfig(1e6, scaling=LINEAR), "sliding_attention": RopeConfig(1e4)}
    assert config.rope == config.ropes_by_layer_type["full_attention"]


def test_a_text_model_nested_in_a_larger_one_reads_as_if_it_stood_alone(tmp_path):
    text = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 9}, "eos_token_id": [1, 106]}
    config = load_model_config(write(tmp_path, **outer, text_config=text))
    assert (config.hidden_size, config.num_layers, config.eos_token_ids) == (64, 3, (1, 106))
    # What the nested object leaves out is the family's own.
    assert (config.num_heads, config.head_dim, config.vocab_size, config.rope.theta) == (8, 256, 262_208, 1e6)
    assert config.tie_word_embeddings is True
    with pytest.raises(ModelError, match="text_config is not an object"):
        load_model_config(write(tmp_path, **outer, text_config=[]))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 256),
        (LINEAR, 256),
        (YARN | {"factor": 4.0}, 1024),
        (YARN | {"original_max_position_embeddings": 64}, 256),
        ({"rope_type": "dynamic", "factor": 3.0}, 768),
        ({"rope_type": "dynamic", "factor": "x"}, 256),
    ],
)
def test_scaled_positions_may_reach_past_the_context_length(scaling, longest, tmp_path):
    config = load_model_config(write(tmp_path, **BASE, rope_scaling=scaling))
    assert (config.max_position_embeddings, config.max_model_len) == (256, longest)


def test_what_nobody_has_read_is_known(tmp_path):
    config = load_model_config(write(tmp_path, **BASE, logit_scale=2.0, sliding_window=None, attention_bias=True))
    assert config.fields.unread() == {"logit_scale": 2.0, "attention_bias": True}
    assert config.fields.flag("attention_bias") is True
    assert config.fields.unread() == {"logit_scale": 2.0}


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
    "rope of layers": ({"rope_parameters": {"full_attention": 3}}, "full_attention 3, not an object"),
    "theta of layers": ({"rope_parameters": {"sliding_attention": {}}}, "has no rope_theta for sliding_attention"),
    "rotary factor": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, not a number up to 1"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
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
