"""Where everything of the peers lies under one root directory. Paths only; nothing is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PEERS = ("vllm", "llamacpp", "openvino", "transformers")
DEFAULT_ROOT = Path("~/.cache/headrace/peers")
MODEL = "smollm2-135m-instruct"
"""The model that all are measured on: the default one."""

LLAMA_SDIST = "llama_cpp_python-0.3.36"


@dataclass(frozen=True)
class Layout:
    """Paths under the root; the root is absolute."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> Layout:
        """The layout under a root that may begin with `~` or be relative."""
        return cls(root.expanduser().absolute())

    def venv(self, peer: str) -> Path:
        """A peer's own environment."""
        return self.root / peer / "venv"

    def program(self, peer: str, name: str) -> Path:
        """A program of a peer's environment."""
        return self.venv(peer) / "bin" / name

    @property
    def hf_model(self) -> Path:
        """The weights as bfloat16 safetensors, in Hugging Face layout."""
        return self.root / "models" / "hf-bf16"

    @property
    def hf_model_endless(self) -> Path:
        """The same without an end token, for a server that knows no `ignore_eos`."""
        return self.root / "models" / "hf-bf16-endless"

    @property
    def bf16_gguf(self) -> Path:
        """The weights as a bfloat16 GGUF file."""
        return self.root / "models" / "bf16.gguf"

    @property
    def openvino_model(self) -> Path:
        """The weights in OpenVINO's form, 8 bits each."""
        return self.root / "models" / "openvino-int8"

    @property
    def downloads(self) -> Path:
        """Source archives."""
        return self.root / "downloads"

    @property
    def llama_source(self) -> Path:
        """llama.cpp as it lies in llama-cpp-python's source archive."""
        return self.root / "llamacpp" / LLAMA_SDIST / "vendor" / "llama.cpp"

    @property
    def llama_build(self) -> Path:
        """llama.cpp's build folder."""
        return self.root / "llamacpp" / "build"

    @property
    def llama_server(self) -> Path:
        """llama.cpp's server."""
        return self.llama_build / "bin" / "llama-server"

    @property
    def stamps(self) -> Path:
        """Which steps of the set-up are done."""
        return self.root / "stamps"

    @property
    def logs(self) -> Path:
        """What the steps of the set-up and the servers print."""
        return self.root / "logs"

    def tcmalloc(self) -> Path | None:
        """The allocator that vLLM advises to preload: the system's, or the one unpacked by the set-up; `None` without either."""
        folders = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64"), *self._unpacked())
        found = (folder / "libtcmalloc_minimal.so.4" for folder in folders)
        return next((path for path in found if path.exists()), None)

    def _unpacked(self) -> list[Path]:
        return sorted((self.root / "vllm" / "tcmalloc").glob("usr/lib/*"))
