"""How TensorRT plans are run, as the caller chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorRtOptions:
    """The defaults are safe; whether speculation pays is to be measured where it is used."""

    graphs: bool = True  # CUDA graphs for shapes that come again
    speculate: bool = False  # enqueue the next segment before it is known that anybody goes on
    runtime_cache: Path | None = None  # TensorRT-RTX: a directory for kernels compiled here, kept between runs
