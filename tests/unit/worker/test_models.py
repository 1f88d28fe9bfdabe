"""Goal: models are taken by what config.json says of them, whole: published ones are known, no field that matters is ignored."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError, ModelError
from headrace.models.model_config import ModelConfig, load_model_config
from services.worker.layers.config_check import COMPUTING, HARMLESS, unknown_fields
from services.worker.models.registry import ARCHITECTURES, build_encoder, build_model
from tests.unit.worker.published_configs import COMMON, MINI_LM, PUBLISHED
from tests.unit.worker.recording_ops import RecordingOps

REMOTE_CODE_FIELDS = {"Phi-4-mini-instruct": ("full_attn_mod", "interpolate_factor")}
WINDOWS = {
    "Mistral-7B-v0.1": {4096: 32},
    "gemma-2-2b": {4096: 13, None: 13},
    "gemma-3-1b-it": {512: 22, None: 4},
    "gemma-3-4b-it": {1024: 29, None: 5},
    "Olmo-3-1025-7B": {4096: 24, None: 8},
    "Phi-3-mini-4k-instruct": {2047: 32},
    "Phi-4-mini-instruct": {262144: 32},
    "gpt-oss-20b": {128: 12, None: 12},
}


def read(directory: Path, config: Mapping[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return load_model_config(directory)


def build(config: ModelConfig, *, present: tuple[str, ...] = (), external_package: str = "") -> RecordingOps:
    """Build a model and state one step of it."""
    ops = RecordingOps(present)
    model = build_model(config, ops, max_model_len=64, external_package=external_package)
    assert model.forward(ops) == config.vocab_size
    return ops


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_taken_whole(name: str, tmp_path: Path) -> None:
    published, num_parameters = PUBLISHED[name]
    config = read(tmp_path, published | COMMON)
    ops = build(config)
    assert ops.num_parameters == num_parameters
    assert unknown_fields(config) == REMOTE_CODE_FIELDS.get(name, ())
    windows = [spec.window for spec in ops.attended]
    assert {window: windows.count(window) for window in set(windows)} == WINDOWS.get(name, {None: config.num_layers})
    assert [spec.layer for spec in ops.attended] == list(range(config.num_layers))


def test_every_architecture_has_a_published_model() -> None:
    assert {published["architectures"][0] for published, _ in PUBLISHED.values()} == set(ARCHITECTURES)


def test_a_published_encoder_is_taken_whole(tmp_path: Path) -> None:
    config = read(tmp_path, MINI_LM)
    ops = RecordingOps()
    assert build_encoder(config, ops, pooling="mean").forward(ops) == 384
    # Without the pooler, 384 * 384 + 384, which makes no vectors.
    assert ops.num_parameters == 22_713_216 - 147_840
    assert unknown_fields(config) == ()


def test_what_families_have_of_their_own_is_read(tmp_path: Path) -> None:
    gemma = build(read(tmp_path, PUBLISHED["gemma-2-2b"][0])).attended[0]
    assert (gemma.scale, gemma.soft_cap, gemma.q_norm) == (256**-0.5, 50.0, None)
    smollm = build(read(tmp_path, PUBLISHED["SmolLM3-3B"][0])).attended
    assert [spec.rotary is None for spec in smollm] == [False, False, False, True] * 9
    phi = build(read(tmp_path, PUBLISHED["Phi-4-mini-instruct"][0]))
    assert phi.rotaries[0].cos.shape == (64, 48)
    assert build(read(tmp_path, PUBLISHED["gpt-oss-20b"][0])).attended[0].sinks == 64
    assert build(read(tmp_path, PUBLISHED["Qwen3-0.6B"][0])).attended[0].q_norm == 128
    assert build(read(tmp_path, PUBLISHED["OLMo-2-0425-1B"][0])).attended[0].q_norm == 2048


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_model_that_takes_images_is_found(prefix: str, tmp_path: Path) -> None:
    ops = build(read(tmp_path, PUBLISHED["gemma-3-4b-it"][0]), present=(f"{prefix}embed_tokens.weight",))
    assert all(name.startswith(prefix) for name in ops.shapes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-3.2-1B", {"sliding_window": 128}, "sliding_window 128 is not supported for LlamaForCausalLM"),
        ("Llama-3.2-1B", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping 20.0 is not supported for LlamaForCausalLM"),
        ("Llama-3.2-1B", {"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported; supported are silu"),
        (
            "Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "proportional"}},
            "'proportional' is not supported; supported are default, ",
        ),
        (
            "Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 1}},
            "has alpha, which rope type 'linear'",
        ),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "has mrope_section"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, "factor is 0.5, not a number above 1"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "longrope"}}, "short_factor is not a list of 32 numbers"),
        ("Llama-3.2-1B", {"layer_types": ["sliding_attention"] * 16}, "layer_types .* is not supported"),
        ("Mistral-7B-v0.1", {"attention_bias": True}, "attention_bias True is not supported for MistralForCausalLM"),
        (
            "Qwen2.5-0.5B",
            {"layer_types": ["chunked_attention"] * 24},
            "'chunked_attention' is not supported; supported: full_attention",
        ),
        ("Qwen2.5-0.5B", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 items for 24 layers"),
        ("Qwen2.5-0.5B", {"layer_types": ["sliding_attention"] * 24}, "sliding_window is missing, but layer_types has sliding"),
        ("Qwen2.5-0.5B", {"max_window_layers": -1}, "max_window_layers is -1"),
        ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size 512 is not supported"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129, but there are 128 experts"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ("Phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias True is not supported"),
        ("Phi-3-mini-4k-instruct", {"rope_scaling": {"type": "su"}}, "short_factor is not a list of 48 numbers"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers has 4 items for 36 layers"),
        ("granite-3.3-8b-base", {"residual_multiplier": 0}, "residual_multiplier is 0, not a number above 0"),
        ("gpt-oss-20b", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = read(tmp_path, PUBLISHED[name][0] | changes)
    with pytest.raises(ModelError, match=message):
        build(config)


def test_a_field_that_nobody_knows_is_told(tmp_path: Path) -> None:
    config = read(tmp_path, PUBLISHED["Llama-3.2-1B"][0] | {"mup_width": 4, "layer_types": ["full_attention"] * 16})
    build(config)
    assert unknown_fields(config) == ("mup_width",)


def test_no_field_is_both_harmless_and_not() -> None:
    assert not HARMLESS & COMPUTING.keys()


PACKAGE = """
from services.worker.layers.blocks import Decoder
from services.worker.models.llama import llama

def headless(config, ops, *, max_model_len):
    config.fields.positive("mup_width")
    return llama(config, ops, max_model_len=max_model_len)

class Tiny:
    def __init__(self, config, ops, *, max_model_len):
        shape = (config.vocab_size, config.hidden_size)
        self.table = ops.table("words.weight", shape)

    def forward(self, ops):
        return ops.linear(ops.sampled(ops.embed(self.table)), ops.tied(self.table))

ARCHITECTURES = {"WideLlamaForCausalLM": headless, "Qwen2ForCausalLM": Tiny}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a package from source; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(source: str, name: str = "headrace_extra_models") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        made.append(name)
        return name

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_a_package_adds_and_replaces_families(package: Any, tmp_path: Path) -> None:
    name = package(PACKAGE)
    wide = PUBLISHED["Llama-3.2-1B"][0] | {"architectures": ["WideLlamaForCausalLM"], "mup_width": 4}
    config = read(tmp_path, wide)
    assert build(config, external_package=name).num_parameters == PUBLISHED["Llama-3.2-1B"][1]
    assert unknown_fields(config) == ()
    with pytest.raises(ModelError, match="'WideLlamaForCausalLM' is not supported; supported are Gemma2"):
        build(read(tmp_path, wide))
    # What it takes over has to read what the file says, as ours do.
    shape = {key: value for key, value in PUBLISHED["Qwen2.5-0.5B"][0].items() if key not in ("hidden_act", "sliding_window")}
    assert set(build(read(tmp_path, shape), external_package=name).shapes) == {"words.weight"}
    with pytest.raises(ModelError, match="sliding_window 32768 is not supported"):
        build(read(tmp_path, shape | {"sliding_window": 32768}), external_package=name)
    # Ours stay.
    assert build(read(tmp_path, PUBLISHED["Mistral-7B-v0.1"][0]), external_package=name).num_parameters == 7_241_732_096


def test_the_package_in_the_docs_works(package: Any, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "external-models.md").read_text()
    name = package(page.partition("```python\n")[2].partition("```")[0])
    mine = PUBLISHED["Mistral-7B-v0.1"][0] | {"architectures": ["MyForCausalLM"], "my_window": 9, "sliding_window": None}
    ops = build(read(tmp_path, mine), external_package=name)
    assert {spec.window for spec in ops.attended} == {9}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('no such disk')", "cannot be imported: OSError: no such disk"),
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("", "has no mapping ARCHITECTURES"),
        ("ARCHITECTURES = ['A']", "has no mapping ARCHITECTURES"),
        ("ARCHITECTURES = {'A': 3}", "ARCHITECTURES holds 'A': 3, not a name and a builder"),
    ],
)
def test_a_package_that_cannot_be_used_is_a_config_error(source: str, message: str, package: Any, tmp_path: Path) -> None:
    name = package(source)
    with pytest.raises(ConfigError, match=message) as caught:
        build(read(tmp_path, PUBLISHED["Llama-3.2-1B"][0]), external_package=name)
    assert caught.value.param == "model.external_package"
    assert repr(name) in str(caught.value)


def test_a_package_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'no_such_package' cannot be imported"):
        build(read(tmp_path, PUBLISHED["Llama-3.2-1B"][0]), external_package="no_such_package")


def test_encoders_of_a_package_are_optional(package: Any, tmp_path: Path) -> None:
    ops = RecordingOps()
    build_encoder(read(tmp_path, MINI_LM), ops, pooling="mean", external_package=package("ARCHITECTURES = {}"))
    with pytest.raises(ModelError, match="'LlamaForCausalLM' is not supported; supported are BertModel"):
        build_encoder(read(tmp_path, PUBLISHED["Llama-3.2-1B"][0]), ops, pooling="mean")
