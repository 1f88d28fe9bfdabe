"""Finding, listing and describing model directories."""

from __future__ import annotations

import json

import pytest

from headrace.errors import ModelError
from headrace.models.description import describe
from headrace.models.inspect import LIST_HEADER, list_rows, short_count, show_rows
from headrace.models.pull import pull
from headrace.models.store import directory_name, list_models, resolve


@pytest.fixture
def root(llama_builder, tmp_path):
    root = tmp_path / "root"
    pull(str(llama_builder.write(tmp_path / "tiny.gguf")), root)
    return root


def test_model_is_found_by_name_and_by_path(root, monkeypatch, tmp_path):
    assert resolve("tiny", root) == root / "tiny"
    assert resolve(str(root / "tiny"), tmp_path / "elsewhere") == root / "tiny"
    monkeypatch.chdir(root)
    assert resolve("./tiny", tmp_path / "elsewhere") == root / "tiny"


def test_hub_id_is_found_under_either_spelling(root):
    (root / "tiny").rename(root / "org--tiny")
    assert resolve("org/tiny", root) == root / "org--tiny"
    assert resolve("org--tiny", root) == root / "org--tiny"
    assert [entry.name for entry in list_models(root)] == ["org/tiny"]


@pytest.mark.parametrize("name", ["absent", "../root", "", ".tiny.lock", "/nowhere/at/all", "a\x00b"])
def test_absent_model_says_what_was_looked_for_and_how_to_get_it(name, root):
    with pytest.raises(ModelError, match=r"looked for .*headrace models pull") as caught:
        resolve(name, root)
    assert repr(name) in str(caught.value)


def test_list_shows_models_only(root):
    (root / ".tiny.partial-1").mkdir()
    (root / ".tiny.partial-1" / "config.json").write_text("{}")
    (root / "notes").mkdir()
    (root / "file.txt").write_text("x")
    assert [entry.name for entry in list_models(root)] == ["tiny"]
    assert list_models(root / "absent") == []


@pytest.mark.parametrize("name", ["", ".hidden", "a/b/c", "../x", "a b", "x" * 200, "-x", "a\n"])
def test_bad_names_are_refused(name):
    with pytest.raises(ModelError, match="not a model name"):
        directory_name(name)


def test_description_counts_what_is_there(root):
    model = describe(root / "tiny")
    assert model.architecture == "LlamaForCausalLM"
    assert model.num_parameters == 261 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert (model.context_length, model.vocab_size, model.has_chat_template) == (128, 261, True)
    assert (model.quantisation, dict(model.num_parameters_by_dtype)) == ("f32", {"f32": model.num_parameters})
    names = [file.name for file in model.files]
    assert names == ["config.json", "generation_config.json", "tiny.gguf", "tokenizer.json", "tokenizer_config.json"]
    assert model.size_bytes == sum((root / "tiny" / name).stat().st_size for name in names)


def test_rows_show_a_good_and_a_damaged_model(root):
    (root / "bad").mkdir()
    (root / "bad" / "config.json").write_text("{")
    rows = list_rows(root)
    assert all(len(row) == len(LIST_HEADER) for row in rows)
    assert rows[0][0] == "bad"
    assert rows[0][1].startswith("damaged: ")
    assert rows[1][:2] == ("tiny", "LlamaForCausalLM")
    shown = dict(show_rows(describe(root / "tiny")))
    assert shown["context length"] == "128 tokens"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 "), (999, "999 "), (1500, "1.5 k"), (134_515_008, "134.5 M"), (8 * 10**9, "8.0 G")]
)
def test_counts_are_written_short(count, text):
    assert short_count(count) == text


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_that_contradict_the_config_are_refused(root):
    change_config(root / "tiny", num_hidden_layers=3)
    with pytest.raises(ModelError, match="lack layer 2 of 3"):
        describe(root / "tiny")
    change_config(root / "tiny", vocab_size=300)
    with pytest.raises(ModelError, match=r"shape \(261, 32\), config.json says \(300, 32\)"):
        describe(root / "tiny")


def test_directory_without_tokenizer_is_refused(root):
    (root / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing; pull the model again"):
        describe(root / "tiny")
