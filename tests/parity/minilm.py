"""The real MiniLM-L6 as a bundle, real sentences, and the slow reference that the chain is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle, reference_path
from offramp.export.source import source_from_model
from offramp.models.data import (
    default_encoder_path,
    labels_of,
    load_rotten_tomatoes,
    load_tokenizer,
    texts_of,
    token_ids,
)
from offramp.models.encoder import EncoderConfig, encoder_from_pretrained
from offramp.models.rows import padded
from offramp.policy import FINAL, Policy
from offramp.runtime import Result
from offramp.scores import scores_from_logits
from offramp.trace import Trace

MAX_LENGTH = 128
SEED = 0  # of the exit heads: their weights are random, the encoder's are the pretrained ones
NUM_CALIBRATION = 16
NUM_SENTENCES = 128
TEMPERATURES = (1.5, 0.8, 1.25)
_CLS, _SEP = 101, 102

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class MiniLM:
    """A bundle with FP32, FP16 and INT8 graphs, its uncut graph in a plain session, and tokenised sentences."""

    bundle: Path
    whole: onnxruntime.InferenceSession  # with the optimisations of the runtime
    usual: onnxruntime.InferenceSession  # with all of ONNX Runtime's
    sentences: list[list[int]]  # token ids, special tokens included
    labels: list[int]

    def logits(self, inputs: Inputs) -> list[np.ndarray]:
        """What the whole graph says at every exit: E arrays (N, C)."""
        return self.whole.run(None, inputs)

    def passage(self, rows: int, length: int) -> Inputs:
        """Real text cut into `rows` rows: even ones fill `length` tokens, odd ones about half of it."""
        tokens = itertools.cycle(itertools.chain.from_iterable(ids[1:-1] for ids in self.sentences))
        lengths = [length if row % 2 == 0 else length // 2 + 1 for row in range(rows)]
        cut = [[_CLS, *itertools.islice(tokens, wanted - 2), _SEP] for wanted in lengths]
        return inputs_from_ids(cut, length)


def make_minilm(folder: Path) -> MiniLM:
    """Export pretrained MiniLM-L6 with exits after layers 2, 4 and 6."""
    path = default_encoder_path()
    tokenizer = load_tokenizer(path / "tokenizer.json", MAX_LENGTH)
    splits = load_rotten_tomatoes()
    calibration = inputs_from_ids(token_ids(tokenizer, texts_of(splits.validation[:NUM_CALIBRATION])))
    sequence = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in calibration.items()},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (1, MAX_LENGTH)},
    )
    model = encoder_from_pretrained(path, EncoderConfig(exits=(2, 4, 6)), SEED)
    bundle = folder / "bundle"
    export_bundle(source_from_model("minilm", model, example, DEFAULT_OPSET), bundle, ExportOptions("fp16,int8"))
    chosen = splits.test[:NUM_SENTENCES]
    file = reference_path(bundle) / "whole.onnx"
    # Without the fusion that the runtime does without: it adds in another order (docs/tolerances.md).
    whole = onnxruntime.InferenceSession(
        file, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )
    usual = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return MiniLM(bundle, whole, usual, token_ids(tokenizer, texts_of(chosen)), labels_of(chosen))


def inputs_from_ids(rows: Sequence[Sequence[int]], width: int = 0) -> Inputs:
    """Inputs of rows of token ids, padded to the longest, or to `width` where that is more."""
    input_ids, attention_mask = padded(rows)
    more = ((0, 0), (0, max(0, width - input_ids.shape[1])))
    return {"input_ids": np.pad(input_ids, more), "attention_mask": np.pad(attention_mask, more)}


def batches_of(sentences: Sequence[Sequence[int]], size: int = 32) -> list[Inputs]:
    """Sentences in batches, each padded to its longest."""
    return [inputs_from_ids(sentences[start : start + size]) for start in range(0, len(sentences), size)]


def choose(inputs: Inputs, rows: object) -> Inputs:
    """Some rows of `inputs`."""
    return {name: array[rows] for name, array in inputs.items()}


def everyone_leaves_at(exit_index: int, num_exits: int) -> Policy:
    """The policy under which all rows leave at one exit, which may be the final one."""
    return Policy.thresholds("max_prob", [0.0 if k == exit_index else None for k in range(num_exits - 1)])


def limit_near(scores: np.ndarray, share: float) -> float:
    """A limit that about `share` of `scores` (N,) are below, in the middle of the widest gap nearby.

    Random heads are about equally sure of all rows: a limit on top of a score would test rounding.
    """
    ordered = np.sort(scores.astype(np.float64))
    middle, reach = round(share * (len(ordered) - 1)), max(2, len(ordered) // 10)
    near = ordered[max(0, middle - reach) : middle + reach + 1]
    widest = int(np.diff(near).argmax())
    return float(near[widest : widest + 2].mean())


def thresholds_near(trace: Trace, score: str, shares: Sequence[float | None]) -> Policy:
    """A policy on `score` whose exits let go about 1 - share of all rows; None closes one."""
    column = ("max_prob", "margin", "entropy").index(score)
    limits = [None if s is None else limit_near(trace.scores[:, k, column], s) for k, s in enumerate(shares)]
    return Policy.thresholds(score, limits, tuple(trace.temperatures))


def answer_row_by_row(minilm: MiniLM, policy: Policy, inputs: Inputs) -> Result:
    """What the runner has to answer: every row alone, through the whole graph, the policy as a plain loop."""
    num_rows, num_exits = len(inputs["input_ids"]), len(minilm.whole.get_outputs())
    column = ("max_prob", "margin", "entropy").index(policy.score)
    logits, scores, exits, reasons = [], [], [], []
    for row in range(num_rows):
        said = minilm.logits(choose(inputs, slice(row, row + 1)))
        sure = [scores_from_logits(said[k], t)[0, column] for k, t in enumerate(policy.inverse_temperatures(num_exits))]
        for k, limit in enumerate((*policy.limits, None)):
            fires = limit is not None and (sure[k] <= limit if policy.score == "entropy" else sure[k] >= limit)
            if fires or k == num_exits - 1:
                break
        logits.append(said[k][0])
        scores.append(sure[k])
        exits.append(k)
        reasons.append(policy.score if fires else FINAL)
    stacked = np.stack(logits)
    return Result({"logits": stacked}, stacked.argmax(1), np.array(exits), np.array(scores, np.float32), reasons)
