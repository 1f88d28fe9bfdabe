"""Figures and comparisons: what is said beside a measurement, which measurements make a pair, and how the table shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.peers import compare, report, servers
from bench.peers.block import Block, Target, Turn
from bench.peers.compare import Comparison, turns
from bench.peers.figures import Usage, figures
from bench.peers.layout import Layout
from bench.peers.proc import Memory
from bench.peers.workloads import WORKLOADS
from bench.serve.records import RequestRecord

MIB = 1 << 20


def record(index: int = 0, *, num_tokens: int = 128, num_chunks: int | None = None, error: str | None = None) -> RequestRecord:
    """A request with its first token after 50 ms and one every 10 ms."""
    chunks = [50_000_000 + 10_000_000 * at for at in range(num_tokens if num_chunks is None else num_chunks)]
    return RequestRecord(
        index=index, started_ns=0, ended_ns=chunks[-1], chunk_times_ns=chunks, usage_prompt_tokens=128,
        usage_output_tokens=num_tokens, finish_reason="length", error_kind=error, error_message="broken" if error else "",
    )  # fmt: skip


def used(**cpu_s: float) -> dict[str, Usage]:
    """Of ten seconds; what is not given is nothing."""
    known = {"headrace": 0.0, "vllm": 0.0, "client": 0.0, "machine": sum(cpu_s.values())} | cpu_s
    return {name: Usage(10.0, seconds) for name, seconds in known.items()}


def measured(records: list[RequestRecord], **cpu_s: float) -> dict[str, Any]:
    memory = Memory(pss=100 * MIB, rss=150 * MIB, peak_rss=160 * MIB, num_processes=2)
    return figures(WORKLOADS["W1"], records, memory=memory, used=used(**cpu_s), server="vllm").as_json()


def test_an_undisturbed_measurement_has_no_remark() -> None:
    result = measured([record(0), record(1)], vllm=18.0, client=0.3)
    assert result["remarks"] == []
    assert result["memory"]["peak_pss_mib"] == 110.0
    assert result["cpu_shares"]["vllm"] == 1.8 and result["cpu_shares"]["other"] == 0.0


@pytest.mark.parametrize(
    ("records", "cpu_s", "remark"),
    [
        ([record(0, error="timeout"), record(1)], {}, "failed: 1 of 2 requests: timeout: broken"),
        ([record(0, num_tokens=90)], {}, "other lengths: 1 of 1 answers were not 128 tokens long"),
        ([record(0, num_chunks=64)], {}, "larger chunks: 128 tokens came in 64"),
        ([record(0)], {"headrace": 0.5}, "not idle: headrace used 5% of a core"),
        ([record(0)], {"machine": 3.0}, "disturbed: something else on the machine used 30% of a core"),
        ([record(0)], {"client": 4.0}, "suspect: the client used 40% of a core"),
    ],
)
def test_what_spoils_a_measurement_is_said(records: list[RequestRecord], cpu_s: dict[str, float], remark: str) -> None:
    remarks = measured(records, **cpu_s)["remarks"]
    assert len(remarks) == 1 and remarks[0].startswith(remark)


def test_prompts_that_a_server_counts_otherwise_are_said() -> None:
    odd = record(0)
    odd.usage_prompt_tokens = 129
    assert measured([odd, record(1)])["remarks"] == ["other lengths of prompts: the server counts 129 tokens, not 128"]


def measurement(
    server: str, pair: str, *, ms_a_token: float, round_index: int = 0, in_process: bool = False, **more: Any
) -> dict[str, Any]:
    chunks = [round(1e6 * ms_a_token * (at + 1)) for at in range(128)]
    one = RequestRecord(
        index=0, started_ns=0, ended_ns=chunks[-1], chunk_times_ns=chunks, usage_prompt_tokens=128, usage_output_tokens=128
    )
    names = {"workload": "W1", "round": round_index, "pair": pair, "server": server, "is_in_process": in_process, "num_attempts": 1}
    return {**names, **measured([one]), **more}


def test_a_ratio_is_ours_by_the_peers_of_the_same_pair() -> None:
    found = report.ratios(
        [
            measurement("headrace", "vllm", ms_a_token=5),
            measurement("vllm", "vllm", ms_a_token=10),
            measurement("headrace", "llamacpp", ms_a_token=4),
            measurement("llamacpp", "llamacpp", ms_a_token=8),
            measurement("headrace", "vllm", ms_a_token=5, round_index=1),
            measurement("vllm", "vllm", ms_a_token=20, round_index=1),
        ]
    )
    by_key = {(ratio.peer, ratio.metric): ratio for ratio in found}
    assert by_key["vllm", "out tok/s"].values == pytest.approx((2.0, 4.0))
    assert by_key["vllm", "out tok/s"].median == pytest.approx(3.0)
    assert by_key["vllm", "ITL p50 ms"].values == pytest.approx((0.5, 0.25))
    assert by_key["llamacpp", "TTFT p50 ms"].values == pytest.approx((0.5,))


def test_a_failed_measurement_is_compared_with_nothing() -> None:
    names = {"workload": "W1", "round": 0, "pair": "vllm", "server": "vllm", "is_in_process": False}
    assert report.ratios([measurement("headrace", "vllm", ms_a_token=5), {**names, "error": "gone"}]) == []
    partly = measurement("vllm", "vllm", ms_a_token=5)
    partly["summary"]["num_ok"] = 0
    assert report.ratios([measurement("headrace", "vllm", ms_a_token=5), partly]) == []


def whole_result(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    server = {"about": "as it comes", "ready_s": 3.0, "memory_ready": Memory(pss=MIB).as_json()}
    provenance = {"cpu_model": "a processor", "num_cores": 2, "commit": "abc", "date": "today"}
    return report.as_json(measurements, provenance=provenance, servers={"vllm": server}, settings={"rounds": 1, "scale": 1.0})


def test_the_table_shows_ours_first_then_each_peer_then_the_ratios_and_remarks() -> None:
    pair = "openvino/in-process"
    text = report.markdown(
        whole_result(
            [
                measurement("openvino", pair, ms_a_token=10, in_process=True),
                measurement("headrace", pair, ms_a_token=5),
                {
                    "workload": "W1",
                    "round": 0,
                    "pair": "vllm",
                    "server": "vllm",
                    "is_in_process": False,
                    "error": "not done within 1 s",
                },
                measurement("transformers", "transformers", ms_a_token=9, remarks=["disturbed: a", "disturbed: b"]),
            ]
        )
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    at = {line.split(" | ")[0]: number for number, line in reversed(list(enumerate(rows)))}
    assert at["| headrace"] < at["| openvino (in process)"] < at["| ours / peer"] < at["| W1"]
    assert "| W1 | openvino (in process) | 2.00 (2.00–2.00) | 0.50 (0.50–0.50) |" in text
    assert "| vllm | failed |" in text
    assert "- W1 vllm: not done within 1 s" in text
    assert "- W1 transformers: disturbed: a (and 1 more like it)" in text


def test_a_round_goes_ours_peer_ours_peer_and_each_begins_with_another_peer() -> None:
    def order(round_index: int) -> list[tuple[str, str]]:
        found = turns("W1", ["vllm", "llamacpp"], round_index, in_process=False)
        return [(turn.server, turn.pair) for turn in found]

    first = [("headrace", "vllm"), ("vllm", "vllm")]
    second = [("headrace", "llamacpp"), ("llamacpp", "llamacpp")]
    assert order(0) == first + second
    assert order(1) == second + first


def test_in_process_is_a_pair_of_its_own_where_it_can_be_played() -> None:
    found = turns("W2", ["openvino", "vllm"], 0, in_process=True)
    assert found[2:4] == (Turn("headrace", "openvino/in-process"), Turn("openvino", "openvino/in-process", is_in_process=True))
    assert len(found) == 6
    assert len(turns("W5", ["openvino"], 0, in_process=True)) == 2


def test_a_block_is_the_same_after_a_way_through_its_file() -> None:
    target = Target("vllm", "http://127.0.0.1:1", "m", 1, sends_ignore_eos=True, sends_done=True, work_share=0.25)
    block = Block("W1", 0, "seed", 1.0, 10.0, 1, "tokenizer.json", (target,), (Turn("vllm", "vllm"),), 1.0)
    assert Block.from_json(block.as_json()) == block


def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, servers.ServerSpec]:
    monkeypatch.setattr(servers, "model_gguf", lambda: tmp_path / "model.gguf")
    return {name: make(Layout.at(tmp_path), 1234) for name, make in compare.PEER_SERVERS.items()}


def test_every_peer_is_started_on_its_port_with_its_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, spec in specs(tmp_path, monkeypatch).items():
        assert spec.name == name
        assert spec.argv[0].startswith(str(tmp_path))
        assert "1234" in spec.argv and spec.base_url == "http://127.0.0.1:1234"


def test_peers_have_the_settings_that_make_them_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.os, "sched_getaffinity", lambda _: {0, 1})
    found = specs(tmp_path, monkeypatch)
    assert "--no-kv-unified" in found["llamacpp"].argv and str(Layout.at(tmp_path).bf16_gguf) in found["llamacpp"].argv
    assert found["llamacpp-q4"].argv[-2:] == ["-m", str(tmp_path / "model.gguf")]
    assert found["vllm"].env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert not found["transformers"].sends_ignore_eos and "endless" in found["transformers"].model


def test_cores_with_gaps_are_bound_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.os, "sched_getaffinity", lambda _: {0, 2, 3})
    assert specs(tmp_path, monkeypatch)["vllm"].env["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,3"


def test_ours_is_served_from_the_checkout_with_the_options_given(tmp_path: Path) -> None:
    spec = servers.headrace(tmp_path, port=1234, options=["--worker-dtype=bf16"], run_directory=tmp_path / "run")
    assert spec.argv[:2] == [str(tmp_path / ".venv" / "bin" / "headrace"), "serve"]
    assert {"--router-http-port=1234", "--worker-dtype=bf16", f"--run-directory={tmp_path / 'run'}"} <= set(spec.argv)


def test_blocks_come_round_by_round(tmp_path: Path) -> None:
    comparison = Comparison(
        layout=Layout.at(tmp_path), workloads=("W1", "W4"), peers=("vllm",), rounds=2, scale=1.0, seed="s", checkout=tmp_path,
        our_options=(), in_process=False, turn_limit_s=10.0, retries=0, calm_wait_s=0.0, measure_under=(), python="python",
    )  # fmt: skip
    assert [(block.round, block.workload) for block in compare.blocks(comparison, ())] == [
        (0, "W1"),
        (0, "W4"),
        (1, "W1"),
        (1, "W4"),
    ]
