"""The engine seam: what the runner asks of whatever executes one segment. `fake.py` has the public fake for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class SegmentOutput(NamedTuple):
    """What one segment said about its S rows. A tuple, because one is made per segment and request."""

    carry: Any  # for the next engine of the same backend; what it is and where it lives is the backend's affair
    logits: NDArray[np.float32]  # (S, C)
    prediction: NDArray[np.int64]  # (S,)
    scores: NDArray[np.float32]  # (S, 3): max probability, margin, normalised entropy, all in [0, 1]
    learned: NDArray[np.float32] | None = None  # (S,) in [0, 1]: the model's own confidence, where it has one
    retention: NDArray[np.float32] | None = None  # (S,) in (0, 1]: share of tokens left, where it drops some

    @classmethod
    def of_gate(cls, learned: NDArray[np.float32]) -> SegmentOutput:
        """What a gate says about S rows before the exit's head is asked: how sure it is, and nothing else."""
        nothing = np.empty((0, 0), np.float32)
        return cls(None, nothing, np.zeros(len(learned), np.int64), nothing, learned)

    def rows(self, keep: NDArray[Any] | slice) -> SegmentOutput:
        """What was said about the rows `keep`, positions, a mask or a slice; without the carry."""
        learned = None if self.learned is None else self.learned[keep]
        retention = None if self.retention is None else self.retention[keep]
        return SegmentOutput(None, self.logits[keep], self.prediction[keep], self.scores[keep], learned, retention)


class Engine(Protocol):
    """One segment, ready to run in this process.

    `keeps_carries` says whether a carry outlives the engine's next run and the engine may run in several threads at
    once; a pool neither lets rows wait between engines without it, nor shares them between workers.
    """

    keeps_carries: bool

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        """Run the segment on the rows `rows` (S,) of `carry`, S >= 1.

        For the first segment `carry` maps the model's input names to arrays and `rows` counts all of them;
        afterwards it is the `carry` of the previous segment's output.
        """

    def trimmed(self, carry: Any, dimension: str, size: int) -> Any:
        """`carry`, as `run` takes it, with only the first `size` along `dimension`; all of it where that gains nothing.

        The runner asks for it where the manifest says that the rest is padding which changes no bit.
        """

    def merged(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> Any:
        """One carry for this segment that holds the given rows of several carries, in order; those stay as they are.

        `parts` are carries of outputs of the segment before and positions in them, alike in all but their number of
        rows. Not asked of the first segment. Raises BackendError where the backend cannot do it.
        """

    def close(self) -> None:
        """Give everything back; the engine cannot run afterwards."""
