"""Goal: vectors that clients get are those of transformers, and survive the loss of what makes them.

Method: the real MiniLM from the catalogue beside the chat model, under `headrace serve`; OpenAI's client asks, in both formats.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
import torch
import transformers

from headrace.models.pull import pull
from tests.e2e.process_tree import kill, processes_marked, wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "all-minilm-l6-v2"
TEXTS = [
    "The cat sat on the mat.",
    "A feline rested on a rug.",
    "Quarterly revenue rose by four percent.",
    "Grüße aus Köln — 你好, мир!",
    "x",
    "many words " * 120,
]

Vectors = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def embedding_directory(model_store: Path) -> Path:
    """The real model, pulled where it is not there yet."""
    return pull(MODEL, model_store)


@pytest.fixture(scope="module")
def embedding_server(embedding_directory: Path, default_model_directory: Path, model_store: Path) -> Iterator[Server]:
    with Server(model_store, embedding_model_name=MODEL, supervision_healthy_after_s="0.2") as server:
        client_of(server).embeddings.create(model=MODEL, input="ready?")
        yield server


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def reference(directory: Path, texts: list[str]) -> Vectors:
    """Mean over the tokens' states, of length 1, as the directory says; each text alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            rows.append((state / state.norm()).double().numpy())
    return np.stack(rows)


def served(server: Server, texts: Any, **fields: Any) -> Vectors:
    answer = client_of(server).embeddings.create(model=MODEL, input=texts, **fields)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data])


def test_served_vectors_are_those_of_transformers_in_both_formats(embedding_server: Server, embedding_directory: Path) -> None:
    expected = reference(embedding_directory, TEXTS)
    # Without a format OpenAI's client asks for base64, and unpacks it.
    for fields in ({}, {"encoding_format": "float"}):
        vectors = served(embedding_server, TEXTS, **fields)
        assert vectors.shape == (len(TEXTS), 384)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
        assert (vectors * expected).sum(axis=1).min() >= 0.999


def test_tokens_give_the_vector_of_their_text(embedding_server: Server, embedding_directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding_directory)
    vectors = served(embedding_server, [tokenizer(text)["input_ids"] for text in TEXTS[:3]])
    np.testing.assert_allclose(vectors, served(embedding_server, TEXTS[:3]), atol=1e-5)


def test_both_models_are_listed_and_neither_does_the_others_work(embedding_server: Server) -> None:
    client = client_of(embedding_server)
    assert [model.id for model in client.models.list().data] == [MODEL, "smollm2-135m-instruct"]
    assert client.completions.create(model="", prompt="Hi", max_tokens=2).model == "smollm2-135m-instruct"
    with pytest.raises(openai.BadRequestError, match="makes vectors and generates no text"):
        client.completions.create(model=MODEL, prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="generates text and makes no vectors"):
        client.embeddings.create(model="smollm2-135m-instruct", input="Hi")
    with pytest.raises(openai.BadRequestError, match=r"dimensions must be left out, or 384.*got 5"):
        client.embeddings.create(model=MODEL, input="Hi", dimensions=5)
    with pytest.raises(openai.BadRequestError, match=r"input\.1: a text has 602 tokens; 1 to 512 are allowed"):
        client.embeddings.create(model=MODEL, input=["Hi", "word " * 600])


def test_documents_are_ranked_by_what_they_mean(embedding_server: Server) -> None:
    body = {"query": TEXTS[0], "documents": TEXTS[1:4], "top_n": 2}
    request = urllib.request.Request(
        f"{embedding_server.http}/v1/rerank", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        results = json.load(response)["results"]
    assert (results[0]["index"], len(results)) == (0, 2)


@pytest.mark.parametrize("what", ["services.worker.rank", "services.scheduler", "services.tokenizer"])
def test_texts_survive_whatever_has_them(embedding_server: Server, what: str) -> None:
    server = embedding_server
    texts = [f"text number {index} " + "word " * 40 for index in range(150)]
    expected = served(server, texts[:3])
    found: list[Vectors] = []
    asking = threading.Thread(target=lambda: found.append(served(server, texts)))
    asking.start()
    wait_until(
        lambda: server.metric("headrace_router_open_requests") >= 1 or not asking.is_alive(), WAIT_S, "the texts are under way"
    )
    victims = server.tree() if what == "services.scheduler" else processes_marked(f"HEADRACE_MODEL_NAME={MODEL}")
    (victim,) = [pid for pid, command in server.tree().items() if pid in victims and command.endswith(f"-m {what}")]
    kill(victim)
    asking.join(WAIT_S)
    assert found, "the request ended with an error"
    np.testing.assert_allclose(found[0][:3], expected, atol=1e-5)
    wait_until(lambda: victim not in server.tree(), WAIT_S, "the victim is gone")
