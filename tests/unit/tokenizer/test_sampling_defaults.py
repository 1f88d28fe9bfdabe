"""generation_config.json as sampling parameters."""

from __future__ import annotations

import pytest

from services.tokenizer.sampling_defaults import sampling_defaults


def test_only_what_the_model_sets_is_present() -> None:
    assert not sampling_defaults({}).ListFields()
    defaults = sampling_defaults({"temperature": 0.5, "top_k": 20, "max_new_tokens": 5, "do_sample": True})
    assert {field.name for field, _ in defaults.ListFields()} == {"temperature", "top_k"}
    assert defaults.temperature == pytest.approx(0.5)
    assert defaults.top_k == 20


def test_a_model_that_does_not_sample_is_greedy() -> None:
    defaults = sampling_defaults({"do_sample": False, "temperature": 0.7})
    assert defaults.HasField("temperature")
    assert defaults.temperature == 0
