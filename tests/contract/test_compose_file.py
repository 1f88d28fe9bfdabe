"""compose.yaml as it is read: settings that exist, and a profile that adds a second model and touches nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.config.load import load_settings
from headrace.models.catalogue import CATALOGUE

ROOT = Path(__file__).parents[2]
VARIABLES = dict(line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if line and not line.startswith("#"))
TWINS = {"embedding-model": "model", "embedding-tokenizer": "tokenizer", "embedding-worker": "worker"}


def services(name: str) -> dict[str, Any]:
    text = (ROOT / name).read_text()
    filled = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: VARIABLES.get(found[1], found[2]), text)
    found: dict[str, Any] = yaml.safe_load(filled)["services"]
    return found


SERVICES = services("compose.yaml")
SECTIONS: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting_that_is_good(name: str) -> None:
    """An unknown one would stop the container's start."""
    # Compose fills values in when they are text already: an empty one is empty text.
    load_settings(environment={key: value or "" for key, value in SERVICES[name].get("environment", {}).items()})


def test_the_embeddings_profile_is_all_that_is_not_started_by_itself() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" in service} == set(TWINS)
    assert all(SERVICES[name]["profiles"] == ["embeddings"] for name in TWINS)
    needed = {one for name, service in SERVICES.items() if name not in TWINS for one in service.get("depends_on", ())}
    assert not needed & set(TWINS)


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_what_serves_vectors_is_what_serves_text_with_another_model(name: str, twin: str) -> None:
    """Goal: the two do not drift apart. Method: all of them is the same but for the model and what waits for it."""
    ours, theirs = dict(SERVICES[name]), dict(SERVICES[twin])
    del ours["profiles"]
    waits, expected = ours.pop("depends_on"), theirs.pop("depends_on", {})
    if name == "embedding-model":
        assert ours.pop("command") == [*theirs.pop("command")[:-1], VARIABLES["EMBEDDING_MODEL"]]
    else:
        changed = {"HEADRACE_MODEL_NAME": VARIABLES["EMBEDDING_MODEL"]}
        if name == "embedding-worker":
            changed["HEADRACE_WORKER_STANDBY"] = "false"
        assert ours.pop("environment") == theirs.pop("environment") | changed
        assert waits == {"embedding-model" if key == "model" else key: value for key, value in expected.items()}
    assert ours == theirs


def test_what_is_to_outlive_a_container_is_in_a_volume_that_its_user_owns() -> None:
    """A new volume takes owner and mode of the directory that it hides; the root and /tmp of a container end with it."""
    made = re.findall(r"install --directory --owner=headrace --mode=(\d+) (/\w+)", (ROOT / "Dockerfile").read_text())
    modes = {path: mode for mode, path in made}
    for service in SERVICES.values():
        mounts = [mount.split(":") for mount in service["volumes"]]
        assert {name for name, *_ in mounts} <= set(SECTIONS["volumes"])
        assert {path for _, path, *_ in mounts} <= set(modes)
    router = SERVICES["router"]
    settings = load_settings(environment={key: value or "" for key, value in router["environment"].items()})
    directory = settings.sections["router"].data_directory  # type: ignore[attr-defined]
    assert directory in [mount.partition(":")[2] for mount in router["volumes"]], "writable, hence without :ro"
    assert modes[directory] == "0700"


def test_the_models_can_be_pulled_by_name() -> None:
    assert {VARIABLES["MODEL"], VARIABLES["EMBEDDING_MODEL"]} <= set(CATALOGUE)


def test_one_image_has_one_torch_also_where_there_are_gpus() -> None:
    arguments = [service["build"]["args"] for service in services("compose.gpu.yaml").values()]
    assert arguments == [{"TORCH_INDEX_URL": ""}] * 2
    assert set(services("compose.gpu.yaml")) == {
        name for name, service in SERVICES.items() if service["image"] == "headrace-worker"
    }


def test_triton_can_load_on_a_gpu_what_it_compiles() -> None:
    """Its cache must lie where a container that is read-only can write, and Docker mounts a tmpfs noexec unless told otherwise.

    Compose puts both files' lists together, so what is mounted must be no place of compose.yaml's.
    """
    ours = services("compose.gpu.yaml")["worker"]
    mounts = dict(mount.split(":") for mount in ours["tmpfs"])
    assert "exec" in mounts[ours["environment"]["TRITON_CACHE_DIR"]].split(",")
    assert not mounts.keys() & {mount.partition(":")[0] for mount in SERVICES["worker"]["tmpfs"]}
