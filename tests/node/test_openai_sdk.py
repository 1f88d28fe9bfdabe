"""OpenAI's own Node client against the default model, and an embedding model beside it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from headrace.models.pull import pull
from tests.e2e.server import Server

pytestmark = pytest.mark.node

HERE = Path(__file__).resolve().parent
EMBEDDING_MODEL = "all-minilm-l6-v2"


def test_the_node_client_of_openai_finds_what_it_expects(default_model_directory: Path, model_store: Path) -> None:
    pull(EMBEDDING_MODEL, model_store)
    with Server(model_store, embedding_model_name=EMBEDDING_MODEL) as server:
        done = subprocess.run(
            ["node", "--test", "--test-reporter=spec", "openai_sdk.mjs"],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            cwd=HERE,
            env={**os.environ, "HEADRACE_URL": server.http},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pass 9" in done.stdout, done.stdout
