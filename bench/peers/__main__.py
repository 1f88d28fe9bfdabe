"""Headrace beside other servers, on the same machine, model and prompts: `python -m bench.peers setup`, then `run`.

See README.md here for what is compared and how.
"""

from __future__ import annotations

import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console

from bench.peers.block import main as play_block
from bench.peers.compare import PEER_SERVERS, Comparison
from bench.peers.compare import run as compare
from bench.peers.layout import DEFAULT_ROOT, PEERS, Layout
from bench.peers.report import markdown
from bench.peers.running import ServerError
from bench.peers.setup import model_steps, peer_steps
from bench.peers.steps import StepError, run_steps
from bench.peers.workloads import WORKLOADS

_REPOSITORY = Path(__file__).resolve().parents[2]
_root_option = click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_ROOT,
    show_default=True,
    help="Where the peers live.",
)


class _Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of names out of some."""

    name = "name[,name...]"

    def __init__(self, known: list[str]) -> None:
        self._known = known

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(str(value).split(","))
        if unknown := [name for name in names if name not in self._known]:
            self.fail(f"{', '.join(unknown)}: there are {', '.join(self._known)}", param, ctx)
        if len(set(names)) < len(names):
            self.fail(f"{value} names one twice", param, ctx)
        return names


def _say(text: str) -> None:
    Console(stderr=True).print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare Headrace with vLLM, llama.cpp, OpenVINO GenAI and transformers on this machine."""


@main.command()
@click.option("--peers", type=_Names(list(PEERS)), default=",".join(PEERS), show_default=True, help="Which to set up.")
@_root_option
@click.option(
    "--torch-index",
    default="https://download.pytorch.org/whl/cpu",
    show_default=True,
    help="Where torch's CPU build is; empty: pip's own settings.",
)
def setup(peers: tuple[str, ...], root: Path, torch_index: str) -> None:
    """Install the peers, each in an environment of its own, and convert the model's weights. What is done is not done again."""
    layout = Layout.at(root)
    try:
        run_steps(model_steps(layout), stamps=layout.stamps, logs=layout.logs, say=_say)
        for peer in peers:
            run_steps(peer_steps(peer, layout, torch_index=torch_index), stamps=layout.stamps, logs=layout.logs, say=_say)
    except StepError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--workloads", type=_Names(list(WORKLOADS)), default=",".join(WORKLOADS), show_default=True)
@click.option(
    "--peers", type=_Names(list(PEER_SERVERS)), default=",".join(PEERS), show_default=True, help=f"Of {', '.join(PEER_SERVERS)}."
)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="How often all of it is measured.")
@click.option(
    "--scale", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Of each workload's requests."
)
@click.option("--seed", help="Of the prompts. [default: random, so that a warm prefix cache helps no run]")
@click.option(
    "--checkout",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=_REPOSITORY,
    help="Serve ours from this checkout.",
)
@click.option(
    "--our-option",
    "our_options",
    multiple=True,
    metavar="OPTION",
    help="An option for `headrace serve`, as --worker-dtype=bfloat16.",
)
@click.option("--in-process", is_flag=True, help="Measure OpenVINO without HTTP as well.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Of a measurement that something else on the machine disturbed.",
)
@click.option(
    "--turn-limit-s", type=click.FloatRange(min=1), default=240.0, show_default=True, help="Of one server on one workload."
)
@click.option(
    "--calm-wait-s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long each measurement waits, at most, for the machine to have nothing else to do.",
)
@click.option(
    "--measure-under", default="", metavar="COMMAND", help="Run each measuring process by this, a lock on the machine say."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("bench/results/peers.json"), show_default=True)
@_root_option
def run(*, root: Path, seed: str | None, measure_under: str, out: Path, **options: Any) -> None:
    """Start ours and the peers, and measure them in turn: ours, a peer, ours, the next peer."""
    comparison = Comparison(
        layout=Layout.at(root),
        seed=seed or secrets.token_hex(4),
        measure_under=tuple(shlex.split(measure_under)),
        python=sys.executable,
        **options,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = compare(comparison, out=out, say=_say)
    except (ServerError, StepError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(markdown(result))
    _say(f"written: {out}")


@main.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def table(result: Path) -> None:
    """Print the table of a result file."""
    click.echo(markdown(orjson.loads(result.read_bytes())))


@main.command(hidden=True)
@click.argument("block_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("result_file", type=click.Path(dir_okay=False, path_type=Path))
def block(block_file: Path, result_file: Path) -> None:
    """Play one block: what `run` starts for each workload and round."""
    play_block(block_file, result_file)


if __name__ == "__main__":
    main(prog_name="bench.peers")
