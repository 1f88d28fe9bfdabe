"""The simulator: traces, conservation, and a case small enough to compute by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.simulate import report
from bench.simulate.__main__ import main
from bench.simulate.engine import STEP_MODELS, Cluster, GapHistogram, Outcome, Simulation, StepModel, Timeline
from bench.simulate.trace import TraceError, Workload, generate, read_trace
from services.scheduler.prefill_delayer import DelayerLimits

MODEL = StepModel(base_s=0.01, row_s=0.001, token_s=0.0001)
WORKLOAD = Workload(num_requests=200, rate_per_s=40, mean_input_tokens=100, mean_output_tokens=20, seed=5)
CLUSTER = Cluster(num_lanes=2, num_pages=512, max_num_seqs=16, step_model=MODEL)


def line(**changes: object) -> str:
    return json.dumps({"timestamp": 0, "input_length": 4, "output_length": 2, "hash_ids": [1, 2], **changes})


def comparable(outcome: Outcome) -> dict[str, object]:
    return {name: value for name, value in report.as_json(outcome).items() if name not in ("wall_s", "core_s")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: must be an object, is list"),
        (line(model="m"), "line 2: unknown field 'model'; known: hash_ids"),
        ('{"timestamp": 1}', "line 2: input_length is missing"),
        (line(timestamp=-1), "line 2: timestamp must be a number of at least 0, is -1"),
        (line(timestamp=float("nan")), "line 2: timestamp must be a number of at least 0, is nan"),
        (line(input_length=0), "line 2: input_length must be a whole number of at least 1, is 0"),
        (line(input_length=4.5), "line 2: input_length must be a whole number of at least 1, is 4.5"),
        (line(output_length="2"), "line 2: output_length must be a whole number of at least 1, is '2'"),
        (line(tenant=1), "line 2: tenant must be a text, is 1"),
        (line(priority="high"), "line 2: priority must be a whole number, is 'high'"),
        (line(hash_ids="1"), "line 2: hash_ids must be a list of whole numbers of at least 0"),
        (line(hash_ids=[1, -1]), "line 2: hash_ids must be a list of whole numbers of at least 0"),
        (line(hash_ids=[1]), "line 2: 1 hash_ids of 2 tokens are fewer than input_length 4"),
        (line(timestamp=5), "line 3: timestamp 0 is before that of the line above, 5"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message.replace("[", r"\[").replace("(", r"\(")):
        list(read_trace([line(), text, line()], block_tokens=2))


def test_equal_ids_are_equal_tokens() -> None:
    first, second, third = read_trace([line(), line(hash_ids=[1, 3], tenant="t", priority=4), line(hash_ids=[])], block_tokens=2)
    assert first.prompt[:2] == second.prompt[:2]
    assert first.prompt[2:] != second.prompt[2:]
    assert len(third.prompt) == 4
    assert (second.tenant, second.priority, second.num_output_tokens) == ("t", 4, 2)


def test_a_generated_trace_is_like_its_workload() -> None:
    workload = Workload(
        num_requests=4000,
        rate_per_s=50,
        mean_input_tokens=300,
        mean_output_tokens=60,
        tenant_load=(10, 1),
        num_prefixes=3,
        prefix_tokens=32,
    )
    made = list(generate(workload))
    assert made == list(generate(workload))
    assert made != list(generate(replace(workload, seed=1)))
    assert made[-1].arrival_ns / 1e9 == pytest.approx(4000 / 50, rel=0.1)
    assert sum(len(one.prompt) - 32 for one in made) / 4000 == pytest.approx(300, rel=0.1)
    assert sum(one.num_output_tokens for one in made) / 4000 == pytest.approx(60, rel=0.1)
    assert sum(one.tenant == "tenant-0" for one in made) / 4000 == pytest.approx(10 / 11, rel=0.05)
    assert len({one.prompt[:32].tobytes() for one in made}) == 3


def test_by_hand() -> None:
    """A prompt of 20 tokens over a budget of 8: chunks of 8, 8 and 4, then two further tokens."""
    requests = read_trace([json.dumps({"timestamp": 1000, "input_length": 20, "output_length": 3})])
    outcome = Simulation(Cluster(max_num_batched_tokens=8, step_model=MODEL)).run(requests, expected_s=1)
    chunk_s = [0.01 + 0.001 + 0.0001 * (count - 1) for count in (8, 8, 4)]
    assert list(outcome.ttft_s) == pytest.approx([sum(chunk_s)])
    assert list(outcome.itl_s) == pytest.approx([0.011])
    assert list(outcome.e2e_s) == pytest.approx([sum(chunk_s) + 2 * 0.011])
    assert (outcome.num_steps, outcome.num_output_tokens) == (5, 3)
    assert outcome.simulated_s == pytest.approx(1 + sum(chunk_s) + 0.022)


def test_a_worker_holds_the_next_plan_while_a_step_runs() -> None:
    """The same three chunks and two further tokens, as the plans leave earlier and nobody comes in between."""
    trace = [json.dumps({"timestamp": 0, "input_length": 20, "output_length": 3})]
    figures = []
    for run_ahead in (False, True):
        simulation = Simulation(Cluster(max_num_batched_tokens=8, step_model=MODEL, run_ahead=run_ahead))
        (lane,) = simulation.core.lanes
        assert lane.max_in_flight == 1 + run_ahead
        figures.append(comparable(simulation.run(read_trace(trace), expected_s=1)))
    assert figures[0] == figures[1]


def test_who_comes_while_two_plans_are_made_waits_for_both() -> None:
    trace = [json.dumps({"timestamp": at, "input_length": 4, "output_length": out}) for at, out in ((0, 40), (100, 1))]
    ttft_s = {}
    for run_ahead in (False, True):
        outcome = Simulation(Cluster(step_model=MODEL, run_ahead=run_ahead)).run(read_trace(trace), expected_s=1)
        ttft_s[run_ahead] = outcome.ttft_s[0]
    # Steps end at 11.3 and every further 11 ms; the one under way at 100 ms ends at 110.3.
    step_s = 0.01 + 2 * 0.001 + 3 * 0.0001
    assert ttft_s[False] == pytest.approx(0.0103 - 0.0 + step_s)
    assert ttft_s[True] == pytest.approx(0.0103 + 0.011 + step_s)


def test_gaps_are_counted_by_step() -> None:
    """One request decodes for ten steps; in one of them another's prompt of 51 tokens is computed, too."""
    trace = [
        json.dumps({"timestamp": 0, "input_length": 1, "output_length": 11}),
        json.dumps({"timestamp": 50, "input_length": 51, "output_length": 1}),
    ]
    gaps = Simulation(Cluster(step_model=MODEL)).run(read_trace(trace), expected_s=1).gaps
    assert gaps.percentile(50) == pytest.approx(0.011, rel=0.02)
    assert gaps.percentile(90) == pytest.approx(0.011, rel=0.02)
    assert gaps.percentile(91) == pytest.approx(0.01 + 2 * 0.001 + 50 * 0.0001, rel=0.02)
    assert GapHistogram().percentile(50) is None


def test_a_prompts_token_costs_more_the_more_stand_before_it() -> None:
    """A prompt of 2,000 tokens in two steps; before the second chunk stand 1,000."""
    model = StepModel(base_s=0.01, row_s=0.001, token_s=0.0001, depth_s=0.0002)
    trace = [json.dumps({"timestamp": 0, "input_length": 2000, "output_length": 1})]
    outcome = Simulation(Cluster(step_model=model, max_num_batched_tokens=1000)).run(read_trace(trace), expected_s=1)
    assert outcome.ttft_s[0] == pytest.approx(2 * 0.011 + 2 * 999 * 0.0001 + 999 * 0.0002)


def test_long_prompts_do_not_stop_those_that_decode_where_a_target_is_set() -> None:
    trace = [json.dumps({"timestamp": 0, "input_length": 4, "output_length": 400}) for _ in range(4)]
    trace += [json.dumps({"timestamp": at, "input_length": 4000, "output_length": 1}) for at in range(500, 4000, 1000)]
    gap_s = {}
    for target_s in (0.0, 0.05):
        cluster = Cluster(step_model=STEP_MODELS["native"], mixed_step_target_s=target_s)
        outcome = Simulation(cluster).run(read_trace(trace), expected_s=5)
        assert (outcome.num_limited_steps > 0) == (target_s > 0)
        gap_s[target_s] = outcome.gaps.percentile(99)
    assert gap_s[0.0] > 0.25
    # Three steps are needed to learn it.
    assert gap_s[0.05] <= 0.055


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "fair", "priority"])
def test_nothing_is_lost_and_a_run_can_be_repeated(policy: str, run_ahead: bool, group_size: int) -> None:
    def run() -> dict[str, object]:
        cluster = replace(
            CLUSTER, policy=policy, num_pages=64, run_ahead=run_ahead, group_size=group_size, mixed_step_target_s=0.02
        )
        return comparable(Simulation(cluster).run(generate(WORKLOAD), expected_s=5))

    first = run()
    assert first == run()
    assert first["num_finished"] == first["num_requests"] == 200
    assert first["num_failed"] == first["num_rejected"] == 0


def test_preempted_requests_have_one_first_token() -> None:
    """Important ones push others out while their steps are under way; every prompt is counted once all the same."""
    requests = [replace(one, priority=20 * (index % 2)) for index, one in enumerate(generate(WORKLOAD))]
    outcome = Simulation(replace(CLUSTER, policy="priority", num_pages=64, run_ahead=True)).run(iter(requests), expected_s=5)
    assert outcome.num_preemptions
    assert outcome.num_prompt_tokens == sum(len(one.prompt) for one in requests)
    assert outcome.num_output_tokens == sum(one.num_output_tokens for one in requests)
    assert all(first <= last for first, last in zip(outcome.ttft_s, outcome.e2e_s, strict=True))


def test_refused_requests_are_counted() -> None:
    trace = [json.dumps({"timestamp": 0, "input_length": length, "output_length": 5}) for length in (20, 20, 20, 500)]
    cluster = Cluster(max_num_seqs=1, max_waiting_requests=1, max_model_len=100, step_model=MODEL)
    outcome = Simulation(cluster).run(read_trace(trace), expected_s=1)
    assert (outcome.num_requests, outcome.num_rejected, len(outcome.e2e_s)) == (4, 2, 2)


def test_all_output_is_counted_and_no_more_is_cached_than_asked() -> None:
    workload = replace(WORKLOAD, num_prefixes=2, prefix_tokens=64)
    outcome = Simulation(CLUSTER).run(generate(workload), expected_s=5)
    assert outcome.num_output_tokens == sum(one.num_output_tokens for one in generate(workload))
    assert outcome.num_prompt_tokens == sum(len(one.prompt) for one in generate(workload))
    assert 0.2 < outcome.hit_rate < 64 / 164 + 0.1
    assert 0 < outcome.busy_share <= 1


def test_requests_that_allow_more_than_they_get_end_where_they_end() -> None:
    workload = replace(WORKLOAD, num_requests=60)
    exact = Simulation(replace(CLUSTER, num_pages=64)).run(generate(workload), expected_s=2)
    asked = Simulation(replace(CLUSTER, num_pages=64, asked_tokens=2000, fixed_share=0.0)).run(generate(workload), expected_s=2)
    assert asked.num_output_tokens == exact.num_output_tokens
    assert len(asked.e2e_s) == 60
    cautious = Simulation(replace(CLUSTER, num_pages=64, asked_tokens=2000, fixed_share=1.0)).run(generate(workload), expected_s=2)
    assert cautious.num_output_tokens == exact.num_output_tokens
    assert cautious.num_preemptions <= asked.num_preemptions
    assert cautious.simulated_s > asked.simulated_s, "who expects everything to become long admits too few"


def test_lanes_of_a_group_wait_for_the_slowest() -> None:
    """One lane prefills 100 tokens in each step; the other's decode steps take as long as those."""
    trace = [
        json.dumps({"timestamp": 0, "input_length": 4, "output_length": 40}),
        json.dumps({"timestamp": 1, "input_length": 400, "output_length": 2}),
    ]
    itl_s = {}
    for group_size in (1, 2):
        cluster = Cluster(
            num_lanes=2, group_size=group_size, max_num_batched_tokens=100, step_model=MODEL, delayer_limits=DelayerLimits(0)
        )
        itl_s[group_size] = max(Simulation(cluster).run(read_trace(trace), expected_s=1).itl_s)
    assert itl_s[1] == pytest.approx(0.011)
    # Four of its 39 steps waited for one of 100 prompt tokens.
    assert itl_s[2] == pytest.approx((35 * 0.011 + 4 * (0.011 + 0.0099)) / 39, rel=0.01)


def test_a_prompt_alone_in_its_group_waits_for_lanes_that_decode_and_for_no_others() -> None:
    lines = [
        {"timestamp": 0, "input_length": 4, "output_length": 60, "hash_ids": []},
        {"timestamp": 100, "input_length": 4, "output_length": 2, "hash_ids": []},
    ]
    ttft_s = {}
    for num_requests in (1, 2):
        for num_passes in (0, 30):
            cluster = Cluster(num_lanes=2, group_size=2, step_model=MODEL, delayer_limits=DelayerLimits(num_passes))
            requests = read_trace([json.dumps(line) for line in lines[:num_requests]])
            # The last request is the first to finish.
            ttft_s[num_requests, num_passes] = Simulation(cluster).run(requests, expected_s=1).ttft_s[0]
    assert ttft_s[1, 0] == ttft_s[1, 30] == pytest.approx(0.0113)
    assert ttft_s[2, 0] + 28 * 0.011 < ttft_s[2, 30] <= ttft_s[2, 0] + 29 * 0.011 + 1e-6


def test_fairness_is_that_of_the_time_in_which_all_have_work() -> None:
    line = Timeline(
        seconds=[0, 1, 2, 3, 4],
        served={"a": [0, 100, 300, 500, 900], "b": [0, 0, 100, 200, 200]},
        all_had_work=[False, True, True, True, False],
    )
    assert Outcome(timeline=line).fairness == pytest.approx(400 / 200)
    assert Outcome(timeline=replace(line, all_had_work=[False] * 5)).fairness is None


def test_fair_policy_evens_tenants_out() -> None:
    # All come at about the same time, so that both tenants have work until the smaller one's is done.
    workload = replace(WORKLOAD, num_requests=800, rate_per_s=10_000, tenant_load=(4, 1))
    ratio = {}
    for policy in ("fcfs", "fair"):
        fairness = Simulation(replace(CLUSTER, policy=policy)).run(generate(workload), expected_s=2).fairness
        assert fairness is not None
        ratio[policy] = fairness
    assert ratio["fcfs"] > 2.5
    assert ratio["fair"] < 1.3


def test_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, figures = tmp_path / "runs.png", tmp_path / "runs.json"
    options = "--num-requests 60 --rate 20 --input-tokens 50 --output-tokens 10 --compare policy=fcfs,lpm"
    assert main([*options.split(), "--png", str(png), "--json", str(figures)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(figures.read_text())["runs"]
    assert list(runs) == ["policy=fcfs", "policy=lpm"]
    assert all(run["num_finished"] == 60 for run in runs.values())
    assert "ttft_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        "--compare policies=a",
        "--lanes 0",
        "--rate 0",
        "--step-model none.json",
        "--compare policy=x",
        "--tenant-load 1,0",
        "--prefixes -1",
        "--trace none.jsonl",
    ],
)
def test_bad_options_end_with_status_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--num-requests", "1", *options.split()])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "must be an object, is list"),
        ({"base_s": 0.01, "row_s": 0.001}, "token_s is missing"),
        ({"base_s": 0.01, "row_s": 0.001, "token_s": 0, "page_s": 1}, "unknown field 'page_s'"),
        ({"base_s": 0.01, "row_s": -1, "token_s": 0}, "row_s must be a number of at least 0, is -1"),
        ({"base_s": 0, "row_s": 1, "token_s": 0}, "base_s must be above 0"),
    ],
)
def test_a_bad_step_model_is_named(fields: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.json"
    model.write_text(json.dumps(fields))
    with pytest.raises(SystemExit):
        main(["--num-requests", "1", "--step-model", str(model)])
    assert message in capsys.readouterr().err


def test_a_file_is_played_whole_unless_asked_otherwise(tmp_path: Path) -> None:
    trace, figures, model = tmp_path / "trace.jsonl", tmp_path / "runs.json", tmp_path / "model.json"
    trace.write_text("\n".join(line(timestamp=10 * index) for index in range(1200)) + "\n\n")
    model.write_text(json.dumps({"base_s": 0.001, "row_s": 0, "token_s": 0}))
    common = ["--trace", str(trace), "--block-tokens", "2", "--step-model", str(model), "--json", str(figures)]
    for further, num_requests in (([], 1200), (["--num-requests", "7"], 7)):
        assert main([*common, *further]) == 0
        (run,) = json.loads(figures.read_text())["runs"].values()
        assert run["num_finished"] == num_requests
