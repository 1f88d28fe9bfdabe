"""Goal: fast ways of computing stay near float32, each within its limit (docs/quality.md).

Method: the first 256 tokens of the standard library's docstrings through ours and transformers;
`python -m bench.quality` does 20,480.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import quality

NUM_TOKENS = 256

pytestmark = pytest.mark.usefixtures("native_library")


def test_each_path_stays_within_its_limit(default_model_directory: Path) -> None:
    results = {result.name: result for result in quality.measure(default_model_directory, NUM_TOKENS, window_tokens=NUM_TOKENS)}
    assert results.keys() == quality.LIMITS.keys()
    for name, result in results.items():
        assert result.num_tokens == NUM_TOKENS
        assert 0 < result.mean_kl <= quality.LIMITS[name].mean_kl_max, name
        assert abs(result.perplexity_ratio - 1) <= quality.LIMITS[name].perplexity_change_max, name
        assert result.greedy_agreement >= quality.LIMITS[name].greedy_agreement_min, name
    assert results[quality.NATIVE_BFLOAT16].mean_kl <= results[quality.TRANSFORMERS_BFLOAT16].mean_kl
