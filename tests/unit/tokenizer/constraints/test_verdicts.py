"""The cache of verdicts."""

from __future__ import annotations

from headrace.errors import InvalidRequestError
from services.tokenizer.constraints.verdicts import Verdicts


def test_verdicts_are_found_by_kind_source_and_field() -> None:
    verdicts, error = Verdicts(10_000), InvalidRequestError("no", param="p")
    verdicts.keep(1, "a", "p", "grammar")
    verdicts.keep(2, "a", "p", error)
    assert verdicts.find(1, "a", "p") == "grammar"
    assert verdicts.find(2, "a", "p") is error
    assert verdicts.find(1, "b", "p") is None
    assert verdicts.find(1, "a", "q") is None
    assert verdicts.find(1, "a", "p", "block") is None
    verdicts.keep(1, "a", "p", "another", "block")
    assert (verdicts.find(1, "a", "p"), verdicts.find(1, "a", "p", "block")) == ("grammar", "another")


def test_the_bytes_are_bounded_and_the_one_used_least_lately_goes() -> None:
    verdicts = Verdicts(4000)
    for name in "abc":
        verdicts.keep(1, name, "p", "g" * 100)
    assert verdicts.find(1, "a", "p")
    for name in "defg":
        verdicts.keep(1, name, "p", "g" * 100)
        assert verdicts.num_bytes <= 4000
    assert verdicts.find(1, "b", "p") is None
    assert verdicts.find(1, "g", "p")
    verdicts.keep(1, "large", "p", "g" * 1000)
    assert verdicts.find(1, "large", "p") is None, "larger than the cache"
    assert verdicts.find(1, "g", "p")
