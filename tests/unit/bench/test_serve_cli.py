"""The command line refuses what it cannot run, before anything is sent; and no secret reaches the result."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import machine
from bench.serve.cli import serve


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--concurrency", "1", "--rate", "2"], "give one of them"),
        (["--concurrency", "0"], "above 0"),
        (["--concurrency", "1,two"], "comma-separated"),
        (["--rate", "nan"], "above 0"),
        (["--shared-prefix-tokens", "128"], "must be below --prompt-tokens 128, is 128"),
        (["--num-requests", "0"], "0 is not in the range"),
        (["--dataset", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(serve, ["--model", "m", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_a_dataset_of_messages_needs_the_chat_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    result = CliRunner().invoke(serve, ["--model", "m", "--dataset", str(path)])
    assert result.exit_code == 2
    assert "use --endpoint chat" in result.output


def test_the_api_key_is_blotted_out_of_the_recorded_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/headrace", "bench", "serve", "--api-key", "sk 's", "--api-key=sk 's", "--model=m"])
    found = machine.provenance(secret="sk 's")
    assert found["command"] == "headrace bench serve --api-key '***' '--api-key=***' --model=m"
    assert found["num_cores"] >= 1
