"""Sources of settings, their order, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.config.load import env_name, flag_name, load_settings
from headrace.errors import ConfigError


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text("model:\n  name: from-file\n  store: /file\n  served_name: file\n")
    settings = load_settings(
        file=file,
        environment={"HEADRACE_MODEL_NAME": "from-env", "HEADRACE_MODEL_STORE": "/env", "PATH": "/bin"},
        flags={"model.name": "from-flag"},
    )
    assert (settings.model.name, settings.model.store, settings.model.served_name) == ("from-flag", "/env", "file")
    sources = {key: source for key, _, source in settings.values()}
    assert sources["model.name"] == "flag --model-name"
    assert sources["model.store"] == "env HEADRACE_MODEL_STORE"
    assert sources["model.served_name"] == f"file {file}"
    assert sources["model.max_model_len"] == "default"


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"HEADRACE_MODEL_NMAE": "x"}, "HEADRACE_MODEL_NMAE; did you mean 'HEADRACE_MODEL_NAME'"),
        ({"HEADRACE_MODEL_MAX_MODEL_LEN": "many"}, r"model.max_model_len = 'many' \(env HEADRACE_MODEL_MAX_MODEL_LEN\)"),
        ({"HEADRACE_MODEL_MAX_MODEL_LEN": "-5"}, "greater than or equal to 2"),
        ({"HEADRACE_ROUTER_HTTP_PORT": "65536"}, "router.http_port = '65536'"),
        ({"HEADRACE_WORKER_MAX_NUM_BATCHED_TOKENS": "0"}, "worker.max_num_batched_tokens = '0'.*greater than or equal to 1"),
        ({"HEADRACE_WORKER_PAGE_SIZE": "257"}, "worker.page_size = '257'.*less than or equal to 256"),
        (
            {"HEADRACE_WORKER_KV_CACHE_TOKENS": "1000"},
            "worker.kv_cache_tokens = '1000'.*multiple of page_size, 32, like 992 or 1024",
        ),
        ({"HEADRACE_WORKER_KV_CACHE_TOKENS": "16"}, "multiple of page_size, 32, like 32$"),
        (
            {"HEADRACE_SCHEDULER_POLICY": "best"},
            "scheduler.policy = 'best'.*'fcfs', 'lpm', 'dfs-weight', 'lof', 'random', 'fair' or 'pri",
        ),
        ({"HEADRACE_SCHEDULER_PRIORITY_PREEMPTION_THRESHOLD": "201"}, "less than or equal to 200"),
        ({"HEADRACE_SCHEDULER_PREFILL_DELAY_LOW_WATERMARK": "1.5"}, "less than or equal to 1"),
    ],
)
def test_bad_environment_is_named(environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_settings(environment=environment)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle: {}", "unknown section 'modle'.*did you mean 'model'"),
        ("model: {nmae: x}", "unknown setting 'model.nmae'.*did you mean 'model.name'"),
        ("- 1", "holds a list"),
        ("model: [1]", "section 'model'.*holds a list"),
        ("a: b: c", "is no YAML"),
        ("instance: 5", "instance = 5"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_settings(file=file)


def test_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(file=tmp_path / "none.yaml")


def test_lists_and_null_are_read_from_text() -> None:
    settings = load_settings(
        environment={"HEADRACE_WIRE_ROUTER_TARGETS": "tcp://a:1, tcp://b:2", "HEADRACE_TELEMETRY_ROUTER_METRICS_PORT": "null"}
    )
    assert settings.wire.router_targets == ["tcp://a:1", "tcp://b:2"]
    assert settings.telemetry.metrics_port("router") is None


def test_every_key_has_its_own_variable_and_flag() -> None:
    keys = [key for key, _, _ in load_settings().values()]
    assert len({env_name(key) for key in keys}) == len(keys)
    assert len({flag_name(key) for key in keys}) == len(keys)


def test_every_setting_is_described() -> None:
    for name, section in load_settings().sections.items():
        for field, info in type(section).model_fields.items():
            assert info.description, f"{name}.{field}"
