"""The JSON files written for a GGUF file say what the file says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from headrace.errors import ModelError
from headrace.models.gguf_convert import write_hf_files
from headrace.models.model_config import RopeConfig, load_model_config, load_tokenizer_config


def convert(builder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_hf_files(builder.write(tmp_path / "a.gguf"), out)
    return out


def test_config_gives_the_shape_of_the_network(llama_builder, tmp_path):
    config = load_model_config(convert(llama_builder, tmp_path))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (261, 32, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope) == (128, 1e-05, RopeConfig(10000.0))
    assert (config.eos_token_ids, config.bos_token_id) == ((0,), 1)
    biases = (config.fields.flag("attention_bias"), config.fields.flag("mlp_bias"))
    assert (config.tie_word_embeddings, *biases) == (True, False, False)


def test_output_projection_of_its_own_is_not_tied(untied_llama_builder, tmp_path):
    assert load_model_config(convert(untied_llama_builder, tmp_path)).tie_word_embeddings is False


def test_tokenizer_files_carry_template_and_special_tokens(llama_builder, tmp_path):
    out = convert(llama_builder, tmp_path)
    config = load_tokenizer_config(out)
    assert config.chat_template == llama_builder.metadata["tokenizer.chat_template"]
    assert config.special_tokens == {"bos_token": "<|user|>", "eos_token": "<|end|>"}
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("hell").tokens == ["hell"]
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0, "bos_token_id": 1}


BAD = {
    "no heads": ({"llama.attention.head_count": 0}, "0 attention heads"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, r"head_count is \[4, 4\]"),
    "no context": ({"llama.context_length": None}, "context_length is None"),
    "part rotary": ({"llama.rope.dimension_count": 4}, "4 of 8 dimensions"),
    "text for theta": ({"llama.rope.freq_base": "x"}, "freq_base is 'x'"),
    "layers that are not there": ({"llama.block_count": 4_000_000_000}, "block_count is 4000000000, not at most .* tensors, 20"),
    "values of another size": ({"llama.attention.value_length": 4}, "keys of 8 and values of 4 dimensions"),
    "no layers": ({"llama.block_count": 0}, "num_hidden_layers is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_file_that_does_not_make_sense_is_refused(case, llama_builder, tmp_path):
    values, message = BAD[case]
    for key, value in values.items():
        llama_builder.metadata.pop(key, None)
        if value is not None:
            llama_builder.metadata[key] = value
    with pytest.raises(ModelError, match=message):
        convert(llama_builder, tmp_path)


def test_vocabulary_larger_than_the_embedding_is_refused(llama_builder, tmp_path):
    llama_builder.tensors = [entry for entry in llama_builder.tensors if entry[0] != "token_embd.weight"]
    llama_builder.add_f32("token_embd.weight", np.zeros((8, 32)))
    with pytest.raises(ModelError, match="261 tokens but an embedding of 8 rows"):
        convert(llama_builder, tmp_path)
