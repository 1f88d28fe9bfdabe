"""The `headrace` command. Options of `serve`, `run` and `config` are made from the settings: there is one list of them."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from headrace.config.load import FILE_ENV, SERVICES, Settings, env_name, flag_name, load_settings, parse_text, section_classes
from headrace.errors import ConfigError, HeadraceError
from headrace.home import expand_home
from headrace.supervision.exit_status import ExitStatus

HEALTH_TIMEOUT_S = 3.0


class _Group(click.Group):
    """Turns our errors into one line on stderr and exit status 2, and those of files that cannot be used into one and status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            click.echo(f"headrace: {error.message}", err=True)
            ctx.exit(ExitStatus.CONFIG_ERROR)
        except OSError as error:
            # Where it names a file, that says all; anything else is a fault of ours, or click's own affair.
            if error.filename is None:
                raise
            click.echo(f"headrace: {error}", err=True)
            ctx.exit(ExitStatus.START_FAILED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
def main() -> None:
    """Headrace serves language models as five small services."""


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--config` and one option for each setting."""
    decorated = command
    for section_name, section in reversed(section_classes().items()):
        for field, info in reversed(section.model_fields.items()):
            key = f"{section_name}.{field}"
            default = "null" if info.default is None else json.dumps(info.default)
            option = click.option(
                flag_name(key), _parameter(key), default=None, metavar="VALUE", help=f"{info.description} [{default}]"
            )
            decorated = option(decorated)
    for key, text in (("instance", "Stable name of this process among its kind."), ("run_directory", "Directory of ipc sockets.")):
        decorated = click.option(flag_name(key), _parameter(key), default=None, metavar="VALUE", help=text)(decorated)
    file_option = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), default=None, help="YAML file of settings."
    )
    return file_option(decorated)


def _parameter(key: str) -> str:
    return "set__" + key.replace(".", "__")


def _load(config_file: Path | None, options: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Settings of the command line, and the environment that gives a child the same ones."""
    texts = {
        name.removeprefix("set__").replace("__", "."): value
        for name, value in options.items()
        if name.startswith("set__") and value is not None
    }
    file = config_file or (Path(os.environ[FILE_ENV]) if os.environ.get(FILE_ENV) else None)
    classes = section_classes()
    flags = {key: parse_text(key, text, classes) for key, text in texts.items()}
    settings = load_settings(file=file, environment=os.environ, flags=flags)
    environment = {env_name(key): text for key, text in texts.items()}
    if file is not None:
        environment[FILE_ENV] = str(file.absolute())
    return settings, environment


@main.command()
@settings_options
def serve(config_file: Path | None, **options: Any) -> None:
    """Run all five services on this machine, under one supervisor."""
    from headrace.cli.serve import serve_all

    settings, environment = _load(config_file, options)
    sys.exit(serve_all(settings, environment))


@main.command()
@click.argument("service", type=click.Choice(SERVICES))
@settings_options
def run(service: str, config_file: Path | None, **options: Any) -> None:
    """Run one service under a supervisor of its own: the entry process of a container."""
    from headrace.cli.serve import serve_one

    settings, environment = _load(config_file, options)
    sys.exit(serve_one(service, settings, environment))


@main.group()
def config() -> None:
    """Look at the settings."""


@config.command("show")
@settings_options
def config_show(config_file: Path | None, **options: Any) -> None:
    """Print each setting, its value, and where the value came from."""
    settings, _ = _load(config_file, options)
    _print_columns([("setting", "value", "from"), *((key, json.dumps(value), source) for key, value, source in settings.values())])


@config.command("check")
@settings_options
def config_check(config_file: Path | None, **options: Any) -> None:
    """Check file, environment and flags; say nothing when all is well, or one line and exit with 2."""
    _load(config_file, options)


@main.command()
@click.option("--json", "is_json", is_flag=True, help="Print one JSON document.")
@settings_options
def doctor(is_json: bool, config_file: Path | None, **options: Any) -> None:
    """Look at machine, torch, kernels, models and ports, and say what is missing; exit status 0 when it can serve, else 1."""
    from headrace.doctor.collect import collect
    from headrace.doctor.findings import can_serve, findings
    from headrace.doctor.text import document, finding_lines, rows

    settings, _ = _load(config_file, options)
    facts = collect(settings)
    found = findings(facts)
    if is_json:
        click.echo(json.dumps(document(facts, found), indent=2))
    else:
        _print_columns(rows(facts))
        click.echo("")
        click.echo("\n".join(finding_lines(found)))
    sys.exit(0 if can_serve(found) else 1)


@main.group()
def keys() -> None:
    """CURVE keys of the links."""


@keys.command("create")
@click.argument("directory", type=click.Path(path_type=Path))
def keys_create(directory: Path) -> None:
    """Make one key pair for each role in DIRECTORY; a whole set that is there is kept."""
    from headrace.wire.keys import create_keys

    click.echo(f"{'created' if create_keys(directory) else 'kept'} keys in {directory}")


@main.group()
def models() -> None:
    """Models on this machine."""


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, never cut: what is printed may be read by a program."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _store(store: str | None) -> Path:
    return expand_home(store or load_settings(environment=os.environ).model.store, "model.store")


_store_option = click.option("--store", default=None, help="Directory of models; by default the setting model.store.")


@models.command("pull")
@click.argument("source")
@click.option("--name", default=None, help="Name to give it; by default its own.")
@_store_option
def models_pull(source: str, name: str | None, store: str | None) -> None:
    """Get a model: a catalogue name (smollm2-135m-instruct), a directory, a .gguf file, or a hub id org/name."""
    from headrace.models.progress import ConsoleProgress
    from headrace.models.pull import pull

    click.echo(pull(source, _store(store), progress=ConsoleProgress(), name=name))


@models.command("list")
@_store_option
def models_list(store: str | None) -> None:
    """List the models that are here."""
    from headrace.models.inspect import LIST_HEADER, list_rows

    _print_columns([LIST_HEADER, *list_rows(_store(store))])


@models.command("show")
@click.argument("name")
@_store_option
def models_show(name: str, store: str | None) -> None:
    """Describe one model."""
    from headrace.models.description import describe
    from headrace.models.inspect import show_rows
    from headrace.models.store import resolve

    _print_columns(show_rows(describe(resolve(name, _store(store)))))


@main.command()
@click.argument("service", type=click.Choice(SERVICES))
@click.option("--ready", is_flag=True, help="Ask whether a request could be served, not only whether the process lives.")
def health(service: str, ready: bool) -> None:
    """Ask a service on this machine for its health through its metrics port; exit status 0 or 1."""
    from headrace.telemetry.asking import ask

    telemetry = load_settings(environment=os.environ).telemetry
    port = telemetry.metrics_port(service)
    if not port:
        setting = f"telemetry.{service}_metrics_port"
        found = "null, so it listens on none" if port is None else "0, so it listens on a free one"
        raise ConfigError(f"{setting} is {found}: set it to a port to ask for health there", param=setting)
    path = "/ready" if ready else "/health"
    try:
        status, body = ask(telemetry.metrics_host, port, path, timeout_s=HEALTH_TIMEOUT_S)
    except OSError as error:
        status, body = 0, f"http://{telemetry.metrics_host}:{port}{path}: {error}"
    click.echo(body, err=status != HTTPStatus.OK)
    sys.exit(0 if status == HTTPStatus.OK else 1)


class _Bench(click.Group):
    """Mounts the load clients of the `bench` package, which the ground floor does not import statically."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["serve"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"bench.{cmd_name}.cli"), cmd_name)
        return command


@main.group(cls=_Bench)
def bench() -> None:
    """Measure a server."""


if __name__ == "__main__":
    main()
