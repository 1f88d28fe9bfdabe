"""The `headrace` command, as far as it starts no process."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import main
from headrace.cli.serve import local_specs, serve_all, supervision_limits
from headrace.config.load import load_settings
from headrace.errors import ModelError


def run(*arguments: str, **environment: str | None) -> Result:
    return CliRunner().invoke(main, arguments, env=environment)


def test_keys_are_made_once_and_secrets_are_private(tmp_path: Path) -> None:
    assert run("keys", "create", str(tmp_path / "k")).output.startswith("created")
    secrets = sorted((tmp_path / "k").glob("*.secret"))
    assert len(secrets) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    before = [path.read_bytes() for path in secrets]
    assert run("keys", "create", str(tmp_path / "k")).output.startswith("kept")
    assert [path.read_bytes() for path in secrets] == before


def test_half_a_set_of_keys_is_an_error_with_status_2(tmp_path: Path) -> None:
    run("keys", "create", str(tmp_path))
    (tmp_path / "worker.secret").unlink()
    result = run("keys", "create", str(tmp_path))
    assert result.exit_code == 2
    assert "worker.secret is missing" in result.output


def test_config_show_tells_value_and_source_of_every_setting() -> None:
    result = run("config", "show", "--router-http-port", "8123", HEADRACE_MODEL_NAME="elsewhere")
    lines = {line.split()[0]: line for line in result.output.splitlines()[1:]}
    assert lines["router.http_port"].split() == ["router.http_port", "8123", "flag", "--router-http-port"]
    assert lines["model.name"].split() == ["model.name", '"elsewhere"', "env", "HEADRACE_MODEL_NAME"]
    assert lines["wire.lease_s"].split()[-1] == "default"
    assert lines.keys() == {key for key, _, _ in load_settings().values()}


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["config", "check"], {"HEADRACE_ROUTER_HTTP_PROT": "1"}, "did you mean 'HEADRACE_ROUTER_HTTP_PORT'"),
        (["config", "check", "--router-http-port", "x"], {}, "router.http_port = 'x'"),
        (["config", "check", "--config", "/nowhere.yaml"], {}, "/nowhere.yaml cannot be read"),
        (["config", "check", "--router-htp-port", "1"], {}, "No such option"),
        (["models", "show", "no-such-model"], {}, "headrace models pull"),
        (["run", "cook"], {}, "cook"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_status_2(arguments: list[str], environment: dict[str, str], words: str) -> None:
    result = run(*arguments, **environment)
    assert result.exit_code == 2
    assert words in result.output


def test_config_check_says_nothing_when_all_is_well() -> None:
    result = run("config", "check")
    assert (result.exit_code, result.output) == (0, "")


def test_bench_serve_is_mounted() -> None:
    assert "--concurrency" in run("bench", "serve", "--help").output


def test_serve_starts_what_was_asked_for_and_stops_the_router_first() -> None:
    settings = load_settings(flags={"serve.tokenizer_replicas": 3, "serve.worker_replicas": 2})
    specs = {spec.name: spec for spec in local_specs(settings, {})}
    assert sorted(specs) == [
        "detokenizer-0", "router-0", "scheduler-0", "tokenizer-0", "tokenizer-1", "tokenizer-2", "worker-0", "worker-1",
    ]  # fmt: skip
    assert set(specs["router-0"].stop_before) == specs.keys() - {"router-0"}
    assert specs["tokenizer-1"].env["HEADRACE_TELEMETRY_TOKENIZER_METRICS_PORT"] == "0"
    assert "HEADRACE_TELEMETRY_TOKENIZER_METRICS_PORT" not in specs["tokenizer-0"].env


def test_serve_starts_a_worker_and_a_tokenizer_for_an_embedding_model() -> None:
    settings = load_settings(flags={"embedding_model.name": "/models/mini", "model.max_model_len": 4096})
    specs = {spec.name: spec for spec in local_specs(settings, {"HEADRACE_MODEL_MAX_MODEL_LEN": "4096"})}
    assert {"embedding-worker-0", "embedding-tokenizer-0"} <= set(specs["router-0"].stop_before)
    for name in ("embedding-worker-0", "embedding-tokenizer-0"):
        own = load_settings(environment={key: value for key, value in specs[name].env.items() if key.startswith("HEADRACE_")})
        assert (own.model.name, own.model.name_for_clients, own.model.max_model_len) == ("/models/mini", "mini", None)
    assert "HEADRACE_MODEL_NAME" not in specs["worker-0"].env


@pytest.mark.parametrize(
    ("place", "architecture", "words"),
    [
        ("model.name", "BertModel", "model.name 'm' makes vectors and generates no text"),
        ("embedding_model.name", "LlamaForCausalLM", "embedding_model.name 'm' generates text and makes no vectors"),
    ],
)
def test_a_model_in_the_place_of_the_other_kind_stops_the_start(tmp_path: Path, place: str, architecture: str, words: str) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, made_of in (("m", architecture), ("chat", "LlamaForCausalLM")):
        (tmp_path / name).mkdir()
        config = {"architectures": [made_of], "max_position_embeddings": 8, "rms_norm_eps": 1e-5, **sizes}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    flags = {"model.store": str(tmp_path), "model.name": "chat", place: "m"}
    with pytest.raises(ModelError, match=words):
        serve_all(load_settings(flags=flags), {})


def test_supervision_settings_and_limits_have_the_same_names_and_defaults() -> None:
    settings = load_settings().supervision
    assert vars(supervision_limits(settings)) == settings.model_dump()
