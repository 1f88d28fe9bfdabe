"""The command `headrace bench serve`: load an OpenAI endpoint and report latencies and throughput.

Works against any server of that API (ours, vLLM, SGLang, llama.cpp). Also runs alone: `python -m bench.serve`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
import uvloop
from rich.console import Console

from bench.machine import provenance
from bench.serve import prompts, report
from bench.serve.openai_stream import Endpoint, Sampling
from bench.serve.records import RequestSpec
from bench.serve.run import Outcome, Plan, ProbeError, execute
from bench.serve.summary import Slo
from bench.serve.worker_gap import WorkerMetricsError

Number = TypeVar("Number", int, float)

_TABLE_COLUMNS_MAX = 400


class _NumberList(click.ParamType[tuple[Number, ...]]):
    """A comma-separated list of numbers above zero."""

    def __init__(self, kind: Callable[[str], Number], name: str) -> None:
        self._kind: Callable[[str], Number] = kind
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Number, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no comma-separated list of numbers", param, ctx)
        if any(not number > 0 for number in numbers):
            self.fail(f"each number must be above 0, is {value!r}", param, ctx)
        return numbers


_AT_LEAST_1 = click.IntRange(min=1)
_AT_LEAST_0 = click.IntRange(min=0)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)


@click.command(context_settings={"show_default": True})
@click.option("--base-url", default="http://127.0.0.1:8000", help="The server, with or without /v1.")
@click.option("--model", required=True, help="The model's name, as the server knows it.")
@click.option("--endpoint", type=click.Choice([str(endpoint) for endpoint in Endpoint]), default="completions")
@click.option(
    "--concurrency", type=_NumberList(int, "n[,n...]"), help="Closed loop: requests kept open; a level each. [default: 1]"
)
@click.option("--rate", type=_NumberList(float, "r[,r...]"), help="Open loop instead: requests/s, Poisson arrivals; a level each.")
@click.option("--num-requests", type=_AT_LEAST_1, default=32, help="Requests a level.")
@click.option("--warmup", type=_AT_LEAST_0, default=2, help="Requests before the first level, not counted.")
@click.option("--dataset", default="random", help="`random`, or a JSONL file of `prompt` or `messages`, `output_tokens`.")
@click.option("--prompt-tokens", type=_AT_LEAST_1, default=128, help="Length of random prompts as the server counts it.")
@click.option("--shared-prefix-tokens", type=_AT_LEAST_0, default=0, help="Of which this many words are the same in all.")
@click.option("--output-tokens", type=_AT_LEAST_1, default=128, help="Output tokens asked for.")
@click.option("--ignore-eos", is_flag=True, help="Ask for exactly that many (an extension of vLLM, SGLang and llama.cpp).")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0)
@click.option("--seed", type=int, help="Of prompts and arrivals. [default: random, so that a warm prefix cache helps no run]")
@click.option("--slo-ttft-ms", type=_ABOVE_0, help="Goodput counts requests with at most this TTFT ...")
@click.option("--slo-itl-ms", type=_ABOVE_0, help="... and at most this TPOT (mean gap).")
@click.option("--worker-metrics", help="A worker's /metrics page: report its idle time between steps. [default: do not]")
@click.option("--api-key", help="Sent as a bearer token; kept out of the result.")
@click.option("--timeout-s", type=_ABOVE_0, default=600.0, help="Limit of one request, its stream included.")
@click.option("--new-connections", is_flag=True, help="A connection a request, for servers that drop idle ones.")
@click.option("--allow-errors", is_flag=True, help="Exit with 0 although some requests failed.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here.")
def serve(**options: Any) -> None:
    """Load an OpenAI endpoint and report TTFT, ITL, TPOT, end-to-end latency and throughput."""
    plan = _plan(**options)
    console = Console(stderr=True)
    try:
        outcome = uvloop.run(execute(plan, on_progress=console.print))
    except (ProbeError, WorkerMetricsError) as error:
        raise click.ClickException(f"nothing measured at {plan.base_url}: {error}") from error
    _show(plan, outcome)
    json_path: Path | None = options["json_path"]
    if json_path is not None:
        result = report.as_json(plan, outcome, provenance=provenance(secret=plan.api_key))
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
        click.echo(f"written: {json_path}")
    if outcome.num_ok == 0 or (outcome.num_failed and not options["allow_errors"]):
        raise SystemExit(1)


def _plan(**options: Any) -> Plan:
    if options["concurrency"] and options["rate"]:
        raise click.UsageError("--concurrency is a closed loop, --rate an open one: give one of them")
    if options["shared_prefix_tokens"] >= options["prompt_tokens"]:
        raise click.UsageError(
            f"--shared-prefix-tokens must be below --prompt-tokens {options['prompt_tokens']}, is {options['shared_prefix_tokens']}"
        )
    return Plan(
        base_url=options["base_url"],
        endpoint=Endpoint(options["endpoint"]),
        sampling=Sampling(model=options["model"], temperature=options["temperature"], ignore_eos=options["ignore_eos"]),
        concurrencies=options["concurrency"] or (() if options["rate"] else (1,)),
        rates_per_s=options["rate"] or (),
        num_requests=options["num_requests"],
        num_warmup_requests=options["warmup"],
        num_prompt_tokens=options["prompt_tokens"],
        num_shared_prefix_tokens=options["shared_prefix_tokens"],
        num_output_tokens=options["output_tokens"],
        dataset=_dataset(options["dataset"], Endpoint(options["endpoint"]), num_output_tokens=options["output_tokens"]),
        seed=secrets.randbits(32) if options["seed"] is None else options["seed"],
        slo=Slo(ttft_ms=options["slo_ttft_ms"], itl_ms=options["slo_itl_ms"]),
        timeout_s=options["timeout_s"],
        api_key=options["api_key"],
        new_connections=options["new_connections"],
        worker_metrics_url=options["worker_metrics"],
    )


def _dataset(name: str, endpoint: Endpoint, *, num_output_tokens: int) -> tuple[RequestSpec, ...]:
    if name == "random":
        return ()
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        specs = prompts.parse_dataset(lines, num_output_tokens=num_output_tokens)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--dataset {name}: {error}") from error
    if endpoint is Endpoint.COMPLETIONS and not all(isinstance(spec.prompt, str) for spec in specs):
        raise click.UsageError(f"--dataset {name} holds `messages`: use --endpoint chat")
    return tuple(specs)


def _show(plan: Plan, outcome: Outcome) -> None:
    # Wide enough for every row: where the terminal is narrow, long lines are better than figures cut short.
    console = Console(width=_TABLE_COLUMNS_MAX)
    console.print(report.table(outcome))
    for remark in report.remarks(plan, outcome):
        console.print(f"- {remark}", markup=False, highlight=False)
