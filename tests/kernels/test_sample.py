"""Sampling against its reference, token by token, and the reference against the CPU's path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.sample import launch, reference
from kernels.sample.inputs import Adjustments, SamplingRows
from services.worker import philox, sampler
from tests.kernels.comparing import assert_matches, far_rows, normal, strided
from tests.unit.worker.test_sampler import rows as cpu_rows

TYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "positions": torch.int64,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 1e-3},
    "hot": {"temperature": 5.0},
    "top-k": {"top_k": 7},
    "top-1": {"top_k": 1},
    "top-all": {"top_k": 100_000},
    "top-p": {"top_p": 0.7},
    "top-p-of-almost-all": {"top_p": 0.9999},
    "top-p-of-nothing": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "min-p-of-one": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
}


def rows_of(count: int, **changes: Any) -> SamplingRows:
    """`count` rows of random seeds at random positions; `changes` are values for all rows or one each."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
    values.setdefault("seeds", torch.randint(-(2**63), 2**63 - 1, (count,)))
    values.setdefault("positions", torch.randint(0, 2**40, (count,)))
    return SamplingRows(**{name: torch.as_tensor(values[name], dtype=kind).expand(count).clone() for name, kind in TYPES.items()})


def assert_same_tokens(tokens: list[int], logits: torch.Tensor, rows: SamplingRows) -> None:
    """Hold tokens equal to the reference's; one may differ where a border of the draw or of top-p is nearer than 10⁻⁵."""
    wanted, is_valid = reference.sample(logits, rows)
    for row in [row for row, token in enumerate(tokens) if token != wanted[row]]:
        assert is_valid[row]
        assert rows.temperature[row] > 0
        number = reference.uniform(int(rows.seeds[row]) & (2**64 - 1), int(rows.positions[row]))
        nearby = set()
        for change in (-1e-5, 0.0, 1e-5):
            changed = replace(rows, top_p=rows.top_p + change * (rows.top_p < 1))
            nearby |= {reference.choose(logits[row], changed, row, min(max(number + each, 0.0), 1.0)) for each in (-1e-5, 1e-5)}
        assert tokens[row] in nearby, f"row {row}: token {tokens[row]}, the reference's {wanted[row]}"


def sample_both(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Sample by kernel and by reference, hold them equal, and give the tokens."""
    _, wanted_valid = reference.sample(logits, rows)
    tokens, is_valid = launch.sample(logits, rows)
    assert tokens.dtype == torch.int64
    assert is_valid.dtype == torch.bool
    assert is_valid.tolist() == wanted_valid.tolist()
    assert_same_tokens(tokens.tolist(), logits, rows)
    return tokens


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 4100])
def test_tokens_are_the_references(parameters: dict[str, Any], vocab_size: int) -> None:
    sample_both(normal(4, vocab_size, scale=3), rows_of(4, **parameters))


def test_rows_have_parameters_of_their_own() -> None:
    """Bit for bit the same alone as together, greedy rows and rows that cannot be sampled among them."""
    logits = normal(12, 300, scale=2)
    logits[3] = torch.nan
    logits[7, 5] = torch.inf
    rows = rows_of(
        12,
        temperature=[0.0, 0.7, 1.0, 1.3] * 3,
        top_k=[0, 0, 5, 50, 1, 0] * 2,
        top_p=[1.0, 0.9, 0.3, 0.95] * 3,
        min_p=[0.0, 0.0, 0.05] * 4,
    )
    together = sample_both(logits, rows)
    for row in range(12):
        alone = SamplingRows(**{name: getattr(rows, name)[row : row + 1] for name in TYPES})
        assert launch.sample(logits[row : row + 1], alone)[0].item() == together[row]


@pytest.mark.parametrize("near", [1, 64])
@pytest.mark.parametrize("parameters", [PARAMETERS[name] for name in ("top-k", "top-1", "top-p", "top-p-of-almost-all", "all")])
def test_rows_are_searched_whole_where_much_is_near(parameters: dict[str, Any], near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list that holds few tokens: some rows fit into it, others do not; a token is the same either way."""
    logits, rows = normal(6, 5000, scale=2), rows_of(6, **parameters)
    listed = sample_both(logits, rows)
    monkeypatch.setattr(launch, "NEAR", near)
    assert_same_tokens(sample_both(logits, rows).tolist(), logits, rows)
    assert (sample_both(logits, rows) == listed).sum() >= 5


def test_blocks_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn token's block is the first, the last, and any between; blocks without mass are passed over."""
    monkeypatch.setattr(launch, "_BLOCK_MAX", 16)
    logits = torch.full((30, 200), -torch.inf)
    logits[:10, 3] = logits[10:20, 199] = 0.0
    logits[20:, 40:100] = normal(60)
    tokens = sample_both(logits, rows_of(30)).tolist()
    assert tokens[:20] == [3] * 10 + [199] * 10
    sample_both(normal(8, 200), rows_of(8, top_p=0.9))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [70, 4000]] = 3.0
    assert sample_both(logits, rows_of(2, temperature=0.0, top_k=3, top_p=0.1)).tolist() == [70, 0]


def test_a_share_next_to_one_keeps_what_can_be_drawn() -> None:
    """Sums of the same numbers in two orders differ by more than the 6 · 10⁻⁸ that such a share leaves: none may fall short."""
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for vocab_size in (33, 1000, 4100):
        logits = normal(16, vocab_size, scale=2)
        tokens = sample_both(logits, rows_of(16, seeds=3, positions=torch.arange(16), top_p=almost_one))
        assert tokens.count_nonzero() > 8


def test_equals_of_the_last_kept_are_kept_with_it() -> None:
    """Of four equal tokens, top-k of 2 and top-p of a half keep all: each is drawn at some position."""
    logits = torch.full((40, 30), -5.0)
    logits[:, [3, 9, 20, 29]] = 2.0
    for parameters in ({"top_k": 2}, {"top_p": 0.5}):
        assert set(sample_both(logits, rows_of(40, seeds=9, positions=torch.arange(40), **parameters)).tolist()) == {3, 9, 20, 29}


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((20, 200), -torch.inf)
    logits[:, 150:] = normal(50)
    for parameters in ({}, {"top_k": 60}, {"top_p": 0.99999}, {"min_p": 1e-30}):
        assert (sample_both(logits, rows_of(20, **parameters)) >= 150).all()


def test_rows_that_cannot_be_sampled_are_said() -> None:
    logits = normal(4, 3000)
    logits[0] = -torch.inf
    logits[1, 2999] = torch.nan
    logits[2, 17] = torch.inf
    _, is_valid = launch.sample(logits, rows_of(4))
    assert is_valid.tolist() == [False, False, False, True]
    sample_both(logits, rows_of(4))


def test_extremes_neither_overflow_nor_vanish() -> None:
    logits = normal(3, 50) * 1e30
    sample_both(logits, rows_of(3, temperature=[1e-38, 1.0, 1e30]))
    sample_both(logits - 1e35, rows_of(3, temperature=[1e-38, 1.0, 1e30], top_p=0.9, top_k=10))


def test_the_draw_is_the_cpus() -> None:
    """Numbers bit for bit, at seeds and positions of every size."""
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    positions = [0, 1, 2**31, 2**32, 2**40 + 5, 7, 123]
    wanted = philox.uniforms(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int64))
    assert [reference.uniform(*pair) for pair in zip(seeds, positions, strict=True)] == wanted.tolist()
    signed = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64).copy())
    # Equal tokens, 2 ** 12 of them: the drawn one says the number's upper bits.
    tokens = sample_both(torch.zeros(7, 4096), rows_of(7, seeds=signed, positions=positions))
    assert tokens.tolist() == np.floor(wanted * 4096).astype(int).tolist()


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_tokens_are_the_cpus(parameters: dict[str, Any]) -> None:
    """A request goes on alike on either: the same tokens from the same logits, seed and positions."""
    logits = normal(300, 50, scale=2)
    with torch.device("cpu"):
        on_cpu, _ = sampler.sample(logits.cpu(), cpu_rows(300, **parameters))
    assert_same_tokens(on_cpu.tolist(), logits, rows_of(300, seeds=9, positions=torch.arange(300), **parameters))


def adjustments_of(
    num_rows: int, vocab_size: int, *, repetition: float = 1.3, index_type: torch.dtype = torch.int64
) -> Adjustments:
    """Random entries: lists of different lengths, tokens seen in prompts, in outputs, or only biased."""
    counts = torch.randint(0, vocab_size, (num_rows,))
    counts[0] = 0
    tokens = torch.cat([torch.randperm(vocab_size)[:count] for count in counts.tolist()])
    output_counts = torch.randint(0, 4, tokens.shape, dtype=torch.int32)
    return Adjustments(
        starts=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(index_type),
        max_entries=int(counts.max()),
        tokens=tokens.to(index_type),
        output_counts=output_counts,
        is_seen=(output_counts > 0) | (torch.rand(tokens.shape) < 0.5),
        biases=normal(len(tokens)),
        repetition=torch.full((num_rows,), repetition),
        frequency=normal(num_rows),
        presence=normal(num_rows),
    )


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 50, 700])
def test_penalties_and_biases_are_applied(vocab_size: int, index_type: torch.dtype) -> None:
    logits, adjustments = strided(normal(4, vocab_size)), adjustments_of(4, vocab_size, index_type=index_type)
    wanted = logits.clone()
    reference.adjust(wanted, adjustments)
    launch.adjust(logits, adjustments)
    assert_matches(logits, wanted)


def test_penalties_are_those_of_the_apis() -> None:
    """Without the reference, by hand: seen tokens 0 (twice in the output), 1 (prompt), 2 (once); a bias on 3; 4 is untouched."""
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.5, 1.0]])
    adjustments = Adjustments(
        starts=torch.tensor([0, 4]),
        max_entries=4,
        tokens=torch.tensor([0, 1, 2, 3]),
        output_counts=torch.tensor([2, 0, 1, 0], dtype=torch.int32),
        is_seen=torch.tensor([True, True, True, False]),
        biases=torch.tensor([0.0, 0.0, 0.0, -100.0]),
        repetition=torch.tensor([2.0]),
        frequency=torch.tensor([0.25]),
        presence=torch.tensor([0.5]),
    )
    launch.adjust(logits, adjustments)
    assert logits.tolist() == [[2 / 2 - 2 * 0.25 - 0.5, -2 * 2, 4 / 2 - 0.25 - 0.5, 0.5 - 100, 1.0]]


def test_entries_of_no_token_change_nothing() -> None:
    logits, adjustments = normal(1, 8), adjustments_of(1, 8)
    before = logits.clone()
    values = {name: getattr(adjustments, name) for name in Adjustments.__dataclass_fields__}
    values |= {"starts": torch.tensor([0, 2]), "max_entries": 2, "tokens": torch.tensor([8, -1])}
    values |= {"output_counts": torch.ones(2, dtype=torch.int32), "is_seen": torch.ones(2).bool(), "biases": torch.ones(2)}
    launch.adjust(logits, Adjustments(**values))
    assert torch.equal(logits, before)


def test_adjustments_come_before_the_mask_and_both_before_the_draw() -> None:
    """The most biased token is excluded, the second most is taken."""
    logits, adjustments = normal(2, 64), adjustments_of(2, 64)
    adjusted = logits.clone()
    reference.adjust(adjusted, adjustments)
    best, second = adjusted.topk(2, dim=1).indices.T
    bitmask = torch.full((1, 2), -1, dtype=torch.int32)
    bitmask[0, best[1] // 32] ^= torch.tensor(1).bitwise_left_shift(best[1] % 32).int()
    rows = rows_of(2, temperature=0.0)
    tokens, _ = launch.sample(logits, rows, adjustments=adjustments, bitmask=(bitmask, torch.tensor([1])))
    assert tokens.tolist() == [best[0], second[1]]


def test_no_row_is_no_work() -> None:
    tokens, is_valid = launch.sample(normal(0, 10), rows_of(0))
    assert tokens.shape == is_valid.shape == (0,)
    launch.adjust(normal(1, 10), adjustments_of(1, 10))


def test_offsets_reach_past_two_to_the_31() -> None:
    logits = far_rows(40, dtype=torch.float32)
    logits[2] = normal(40)
    sample_both(logits, rows_of(3, top_p=0.9))


@pytest.mark.parametrize(
    ("logits", "changes", "message"),
    [
        (torch.zeros(2, 8).half(), {}, "logits must have or be torch.float32, got torch.float16"),
        (torch.zeros(2, 0), {}, "logits must have or be a vocabulary of 1 token or more, got 0"),
        (torch.zeros(8, 2).T, {}, "logits must have or be stride 1 in the last dimension"),
        (torch.zeros(2, 8), {"top_k": torch.zeros(2).long()}, "top_k must have or be torch.int32, got torch.int64"),
        (torch.zeros(2, 8), {"top_p": torch.ones(3)}, r"top_p must have or be shape \(2\), got shape \(3,\)"),
        (torch.zeros(2, 8), {"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds must have or be torch.int64, got torch.int32"),
    ],
    ids=["type", "vocabulary", "stride", "top-k", "top-p", "seeds"],
)
def test_wrong_arguments_are_named(logits: torch.Tensor, changes: dict[str, torch.Tensor], message: str) -> None:
    rows = rows_of(2)
    with pytest.raises(KernelArgumentError, match=message):
        launch.sample(logits, SamplingRows(**({name: getattr(rows, name) for name in TYPES} | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": torch.zeros(2).long()}, r"starts must have or be shape \(3\), got shape \(2,\)"),
        ({"output_counts": torch.zeros(5, dtype=torch.int32)}, r"output_counts must have or be shape \(0\)"),
        ({"max_entries": 1}, "max_entries must have or be 0 to num_entries = 0, got 1"),
        ({"repetition": torch.ones(2).half()}, "repetition must have or be torch.float32"),
    ],
    ids=["starts", "counts", "entries", "repetition"],
)
def test_wrong_adjustments_are_named(changes: dict[str, Any], message: str) -> None:
    nothing = adjustments_of(1, 1)
    values = {name: getattr(nothing, name) for name in Adjustments.__dataclass_fields__}
    values |= {"starts": torch.zeros(3).long()} | {name: torch.ones(2) for name in ("repetition", "frequency", "presence")}
    with pytest.raises(KernelArgumentError, match=message):
        launch.adjust(torch.zeros(2, 8), Adjustments(**(values | changes)))
