"""What `offramp run` prints: one plain object per row."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from offramp.commands.dataset import Inputs, load_dataset
from offramp.errors import DataError
from offramp.runtime import Runner


def answers(runner: Runner, data: str, batch_size: int) -> Iterator[dict[str, Any]]:
    """Answer `data` in its order: an .npz file of inputs, a file of texts, or - for texts on stdin.

    Every line is a text, blank ones too. A regression has a value in place of a prediction. Raises DataError,
    InputError or BundleError.
    """
    for inputs in _requests(runner, data, batch_size):
        result = runner.run(inputs)
        for row, prediction in enumerate(result.prediction.tolist()):
            is_value = runner.manifest.is_regression
            said = {"value": float(result.outputs["logits"][row, 0])} if is_value else {"prediction": prediction}
            answer = {
                **said,
                "exit_index": int(result.exit_index[row]),
                "score": None if np.isnan(result.score[row]) else float(result.score[row]),
                "reason": result.reason[row],
            }
            if runner.manifest.labels:
                answer["label"] = runner.manifest.labels[prediction]
            yield answer


def _requests(runner: Runner, data: str, batch_size: int) -> Iterator[Inputs]:
    if Path(data).suffix == ".npz":
        yield from load_dataset(runner, data, "", batch_size).batches
        return
    lines = _lines(data)
    while texts := list(itertools.islice(lines, batch_size)):
        yield dict(runner.encode(texts))


def _lines(data: str) -> Iterator[str]:
    if data == "-":
        yield from (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer)
        return
    try:
        with Path(data).open("rb") as file:
            yield from (line.decode(errors="replace").rstrip("\r\n") for line in file)
    except OSError as exc:
        raise DataError(f"reading {data}: {exc}; expected a file of texts, an .npz file, or - for stdin") from exc
