"""One typed tree of settings out of defaults, a file, the environment and flags; and where each value came from.

    default  <  headrace.yaml  <  HEADRACE_<SECTION>_<FIELD>  <  --<section>-<field>

An unknown key in any of them is an error that names the nearest known one. Nothing is rewritten after loading.
"""

from __future__ import annotations

import difflib
import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from headrace.config.settings import (
    COMMON_SECTIONS,
    EmbeddingModelSettings,
    ModelSettings,
    ServeSettings,
    SupervisionSettings,
    TelemetrySettings,
    WireSettings,
)
from headrace.errors import ConfigError
from headrace.supervision.child import SUPERVISION_VARIABLES

SERVICES = ("router", "tokenizer", "scheduler", "worker", "detokenizer")
DEFAULT_FILE = "headrace.yaml"
ENV_PREFIX = "HEADRACE_"
RUN_DIRECTORY_KEY = "run_directory"
INSTANCE_KEY = "instance"

FILE_ENV = "HEADRACE_CONFIG"
RESERVED_ENV = (SUPERVISION_VARIABLES | {FILE_ENV}) - {"HEADRACE_RUN_DIRECTORY"}
"""Variables with our prefix that are no settings: the file's path, and what the supervisor tells its children."""


@dataclass(frozen=True)
class Settings:
    """The whole tree: two top-level values, the common sections, and each service's own."""

    run_directory: str
    """Directory of ipc sockets, mode 0700; empty means one chosen by `default_run_directory`."""
    instance: str
    """Stable name of this process among its kind; empty means service and host name."""
    sections: Mapping[str, BaseModel]
    sources: Mapping[str, str]
    """Where each value came from, by dotted key."""

    @property
    def model(self) -> ModelSettings:
        """The model that is served."""
        return typing.cast(ModelSettings, self.sections["model"])

    @property
    def embedding_model(self) -> EmbeddingModelSettings:
        """The model that makes vectors beside it."""
        return typing.cast(EmbeddingModelSettings, self.sections["embedding_model"])

    @property
    def wire(self) -> WireSettings:
        """Addresses, keys, leases."""
        return typing.cast(WireSettings, self.sections["wire"])

    @property
    def telemetry(self) -> TelemetrySettings:
        """Logs, traces, metrics."""
        return typing.cast(TelemetrySettings, self.sections["telemetry"])

    @property
    def supervision(self) -> SupervisionSettings:
        """Starts, restarts, stops."""
        return typing.cast(SupervisionSettings, self.sections["supervision"])

    @property
    def serve(self) -> ServeSettings:
        """What `headrace serve` starts."""
        return typing.cast(ServeSettings, self.sections["serve"])

    def values(self) -> list[tuple[str, Any, str]]:
        """Every setting as (dotted key, value, source), in order."""
        found: list[tuple[str, Any, str]] = [
            (key, getattr(self, key), self.sources.get(key, "default")) for key in (RUN_DIRECTORY_KEY, INSTANCE_KEY)
        ]
        for name, section in self.sections.items():
            for field in type(section).model_fields:
                key = f"{name}.{field}"
                found.append((key, getattr(section, field), self.sources.get(key, "default")))
        return found


def section_classes() -> dict[str, type[BaseModel]]:
    """Every section of the tree by name: the common ones, then each service's `config.Settings`.

    Services are named by string: the ground floor imports none of them statically, and their config modules are light.
    """
    classes: dict[str, type[BaseModel]] = dict(COMMON_SECTIONS)
    for service in SERVICES:
        classes[service] = importlib.import_module(f"services.{service}.config").Settings
    return classes


def env_name(key: str) -> str:
    """The environment variable of a dotted key."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def flag_name(key: str) -> str:
    """The command-line flag of a dotted key."""
    return "--" + key.replace(".", "-").replace("_", "-")


def load_settings(
    *, file: Path | None = None, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Merge all sources and check every value.

    Args:
        file: A YAML file; None takes headrace.yaml of the working directory where there is one.
        environment: Variables; only those with our prefix are looked at.
        flags: Values by dotted key, as given on the command line.

    Raises:
        ConfigError: An unknown key or a bad value, with its source and, for keys, the nearest known one.
    """
    classes = section_classes()
    known = {RUN_DIRECTORY_KEY, INSTANCE_KEY} | {
        f"{name}.{field}" for name, section in classes.items() for field in section.model_fields
    }
    raw: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers = [
        _from_file(file, known),
        _from_environment(environment or {}, known, classes),
        {key: (value, f"flag {flag_name(key)}") for key, value in (flags or {}).items()},
    ]
    for layer in layers:
        for key, (value, source) in layer.items():
            if key not in known:
                raise ConfigError(f"unknown setting {key!r} ({source}){_nearest(key, known)}")
            raw[key], sources[key] = value, source
    sections = {name: _make_section(name, section, raw, sources) for name, section in classes.items()}
    for key in (RUN_DIRECTORY_KEY, INSTANCE_KEY):
        if not isinstance(raw.get(key, ""), str):
            raise ConfigError(f"{key} = {raw[key]!r} ({sources[key]}): should be text")
    return Settings(
        run_directory=raw.get(RUN_DIRECTORY_KEY, ""), instance=raw.get(INSTANCE_KEY, ""), sections=sections, sources=sources
    )


def _from_file(file: Path | None, known: set[str]) -> dict[str, tuple[Any, str]]:
    if file is None:
        file = Path(DEFAULT_FILE)
        if not file.exists():
            return {}
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"settings file {file} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {file} is no YAML: {' '.join(str(error).split())}") from error
    found: dict[str, tuple[Any, str]] = {}
    if content is None:
        return found
    if not isinstance(content, dict):
        raise ConfigError(f"settings file {file} holds a {type(content).__name__}, sections are expected")
    source = f"file {file}"
    for name, section in content.items():
        if name in (RUN_DIRECTORY_KEY, INSTANCE_KEY):
            found[name] = (section, source)
            continue
        if not any(key.startswith(f"{name}.") for key in known):
            raise ConfigError(f"unknown section {name!r} ({source}){_nearest(str(name), {key.partition('.')[0] for key in known})}")
        if not isinstance(section, dict | None):
            raise ConfigError(f"section {name!r} ({source}) holds a {type(section).__name__}, keys are expected")
        for field, value in (section or {}).items():
            found[f"{name}.{field}"] = (value, source)
    return found


def _from_environment(
    environment: Mapping[str, str], known: set[str], classes: Mapping[str, type[BaseModel]]
) -> dict[str, tuple[Any, str]]:
    by_name = {env_name(key): key for key in known}
    found: dict[str, tuple[Any, str]] = {}
    for name, text in environment.items():
        if not name.startswith(ENV_PREFIX) or name in RESERVED_ENV:
            continue
        key = by_name.get(name)
        if key is None:
            raise ConfigError(f"unknown environment variable {name}{_nearest(name, set(by_name))}")
        found[key] = (parse_text(key, text, classes), f"env {name}")
    return found


def parse_text(key: str, text: str, classes: Mapping[str, type[BaseModel]] | None = None) -> Any:
    """A value given as text: lists by commas, `null` for none; everything else is left to the field's own type."""
    if "." not in key:
        return text
    section, _, field = key.partition(".")
    annotation = (classes or section_classes())[section].model_fields[field].annotation
    if typing.get_origin(annotation) is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if text.lower() == "null" and type(None) in typing.get_args(annotation):
        return None
    return text


def _make_section(name: str, section: type[BaseModel], raw: Mapping[str, Any], sources: Mapping[str, str]) -> BaseModel:
    values = {field: raw[f"{name}.{field}"] for field in section.model_fields if f"{name}.{field}" in raw}
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"][:1])])
        source = f" ({sources[key]})" if key in sources else ""
        raise ConfigError(f"{key} = {first['input']!r}{source}: {first['msg']}") from error


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
