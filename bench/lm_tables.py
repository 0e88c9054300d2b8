"""Early exits of language models on held-out text: depth, perplexity and time over thresholds.

Physics: a position that leaves after k of L layers saves L - k of them, and pays for each head it asked. The small
models here (d = 128, 4,096 tokens) have heads as large as two and a half layers, so asking each exit costs more than
layers save: what layer counts promise, as in the references, is not what a clock shows. Both are printed.

Checkpoints come from `offramp train` (docs/language-models.md has the commands), by these names in one folder:
early-exit, early-exit-bk, routed-aux, routed-deep, standard-3, standard-1. What is missing is left out. The text is the
corpus's test split, which no training saw. Exits are those of exact generation (deferred): every position sees
full-depth keys and values.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import describe_machine
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional

from offramp.commands.decoders import export_language_model
from offramp.commands.sweep_run import is_trained
from offramp.export.export_bundle import ExportOptions
from offramp.models.checkpoint import load_checkpoint
from offramp.models.corpora import load_shakespeare, token_rows
from offramp.policy import Policy
from offramp.runtime.generator import GenerateOptions, Generator

EARLY_EXIT = (0.7, 0.8, 0.9, 0.95)
LOWER = (0.1, 0.2, 0.3, 0.5)  # where models that were trained for minutes begin to leave
ROUTED = (0.5, 0.7, 0.8, 0.9, 0.95)
RESULT = Path(__file__).parent / "results" / "lm_tables.json"
_BATCH = 32
# What the references say of their own models and text (WikiText-2), to stand beside ours; not comparable in perplexity.
REFERENCE_2 = {  # early-exit language model of ResNet-BK blocks, 4 layers, d = 64: mean exit, speedup, perplexity
    "source": "reference 2, example results: speedup computed from layers",
    "0.7": [1.3, 3.1, 125.4],
    "0.8": [1.9, 2.1, 119.8],
    "0.9": [2.6, 1.5, 117.2],
    "0.95": [3.3, 1.2, 116.8],
    "none": [4.0, 1.0, 116.9],
}
REFERENCE_3 = {  # confidence-routed, 3 layers: perplexity, shallow %, compute %
    "source": "reference 3, threshold analysis",
    "auxiliary": {
        "0.5": [40.61, 95.5, 36.3],
        "0.7": [39.41, 88.7, 40.9],
        "0.8": [40.36, 83.7, 44.2],
        "0.9": [36.98, 71.8, 52.1],
        "0.95": [32.21, 57.1, 61.9],
    },
    "deep": {
        "0.5": [43.05, 95.1, 36.6],
        "0.7": [44.44, 89.9, 40.1],
        "0.8": [45.89, 85.2, 43.2],
        "0.9": [47.38, 75.5, 49.7],
        "0.95": [48.16, 64.6, 56.9],
    },
    "standard_3": [34.86, 0, 100],
    "standard_1": [35.29, 100, 33.3],
}


class Said(NamedTuple):
    """Loss, largest probability and gate of every exit at P positions, (P, E) each, and the model's configuration."""

    losses: NDArray[np.float64]
    sure: NDArray[np.float64]
    gates: NDArray[np.float64] | None
    config: Any


@torch.inference_mode()
def exits_of(checkpoint: Path, num_windows: int) -> Said:
    """What every exit says at every position of the test split."""
    found = load_checkpoint(checkpoint)
    assert found.tokenizer_path is not None
    tokenizer = Tokenizer.from_file(str(found.tokenizer_path))
    rows = token_rows(tokenizer, load_shakespeare().test, found.max_length).tokens[:num_windows]
    losses, sure, gates = [], [], []
    for start in range(0, len(rows), _BATCH):
        window = torch.from_numpy(rows[start : start + _BATCH])
        exits = found.model(window[:, :-1])
        logits = [said.logits for said in exits]  # (P, V) each
        after = window[:, 1:].flatten()
        losses.append(torch.stack([functional.cross_entropy(one, after, reduction="none") for one in logits], 1))
        sure.append(torch.stack([one.softmax(-1).amax(-1) for one in logits], 1))
        if found.config.gated:
            gates.append(torch.stack([said.learned.float() for said in exits[:-1]] + [torch.ones(len(after))], 1))
    gate = torch.cat(gates).double().numpy() if gates else None
    return Said(torch.cat(losses).double().numpy(), torch.cat(sure).double().numpy(), gate, found.config)


def left_at(sure: NDArray[np.float64], threshold: float | None) -> NDArray[np.int64]:
    """The exit of every position (P,): the first that is at least as sure as the threshold, else the final one."""
    leaves = np.ones(sure.shape, bool)
    leaves[:, :-1] = False if threshold is None else sure[:, :-1] >= threshold
    return leaves.argmax(1)


def perplexity(losses: NDArray[np.float64], at: NDArray[np.int64]) -> float:
    return round(float(np.exp(losses[np.arange(len(at)), at].mean())), 2)


def early_exit_table(
    losses: NDArray[np.float64], sure: NDArray[np.float64], layers: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Per threshold: mean exit (in layers), perplexity, speedup computed from layers, where positions leave."""
    table = {}
    depth = np.array(layers)
    for threshold in (*LOWER, *EARLY_EXIT, None):
        at = left_at(sure, threshold)
        mean = float(depth[at].mean())
        table[str(threshold or "none")] = {
            "mean_exit": round(mean, 3),
            "perplexity": perplexity(losses, at),
            "speedup_from_layers": round(layers[-1] / mean, 3),
            "leave": [round(float((at == k).mean()), 4) for k in range(len(layers))],
        }
    return table


def routed_table(losses: NDArray[np.float64], sure: NDArray[np.float64], depth: int) -> dict[str, dict[str, float]]:
    """Per threshold: perplexity, share that takes one layer, and layers computed; in percent."""
    ends = [0, losses.shape[1] - 1]  # an exit between them was for training alone
    table = {}
    for threshold in (*LOWER[1:3], *ROUTED, None):
        at = left_at(sure[:, ends], threshold)
        shallow = float((at == 0).mean())
        table[str(threshold or "none")] = {
            "perplexity": perplexity(losses[:, ends], at),
            "shallow_percent": round(100 * shallow, 1),
            "compute_percent": round(100 * (shallow + (1 - shallow) * depth) / depth, 1),
        }
    return table


def ms_per_token(generator: Generator, policy: Policy, prompt: list[int], count: int) -> float:
    """Wall clock of decoding, prompt and first token left out: the one place where time is taken."""
    generator.policy = policy
    stream = generator.stream([prompt], GenerateOptions(count))
    next(stream)
    start = time.perf_counter()
    taken = sum(1 for _ in stream)
    return 1e3 * (time.perf_counter() - start) / max(1, taken)


def measured(
    checkpoint: Path, prompts: list[list[int]], count: int, rounds: int, scores: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds per generated token and the speedup over full depth, by score and threshold, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_language_model(checkpoint, bundle, ExportOptions(precision="fp32"), lambda _: None)
        with Generator.open(bundle, threads=1) as generator:
            early = generator.decoder.num_exits - 1
            policies: dict[tuple[str, str], Policy] = {}
            for score in scores:
                policies[score, "none"] = Policy.full_depth()
                for t in (*LOWER, *EARLY_EXIT):
                    policies[score, str(t)] = Policy.thresholds(score, [t] * early)
                policies[score, "first exit"] = Policy.thresholds(score, [0.0] * early)
            times: dict[tuple[str, str], list[float]] = {name: [] for name in policies}
            for number in range(rounds + 1):
                for name, policy in policies.items():
                    times[name].append(ms_per_token(generator, policy, prompts[number % len(prompts)], count))
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}  # the first round warms up
    found: dict[str, dict[str, dict[str, float]]] = {score: {} for score in scores}
    for (score, name), value in medians.items():
        speedup = round(medians[score, "none"] / value, 3)
        found[score][name] = {"ms_per_token": round(value, 4), "speedup_measured": speedup}
    return found


def prompts_for(checkpoint: Path, count: int, length: int = 24) -> list[list[int]]:
    found = load_checkpoint(checkpoint)
    assert found.tokenizer_path is not None
    rows = token_rows(Tokenizer.from_file(str(found.tokenizer_path)), load_shakespeare().test, found.max_length)
    return [[int(token) for token in row[:length]] for row in rows.tokens[:: max(1, len(rows.tokens) // count)][:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "work" / "lm", help="the checkpoints")
    parser.add_argument("--windows", type=int, default=400, help="of 128 tokens, of the test split")
    parser.add_argument("--quick", action="store_true", help="60 windows, 3 rounds of 24 tokens; writes no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    windows, tokens, rounds = (60, 24, 3) if options.quick else (options.windows, 96, 9)
    result: dict[str, Any] = {"machine": describe_machine(), "windows": windows}
    for name in ("early-exit", "early-exit-bk"):
        if is_trained(options.folder / name):
            said = exits_of(options.folder / name, windows)
            scores = {"max_prob": said.sure} | ({} if said.gates is None else {"learned": said.gates})
            prompts = prompts_for(options.folder / name, rounds + 1)
            clock = measured(options.folder / name, prompts, tokens, rounds, list(scores))
            result[name] = {}
            for score, values in scores.items():
                table: dict[str, Any] = early_exit_table(said.losses, values, said.config.exits)
                for threshold, found in clock[score].items():
                    table.setdefault(threshold, {}).update(found)
                result[name][score] = table
    for name in ("routed-aux", "routed-deep", "standard-3", "standard-1"):
        if is_trained(options.folder / name):
            losses, sure, _, config = exits_of(options.folder / name, windows)
            if name.startswith("standard"):
                result[name] = {"perplexity": perplexity(losses, left_at(sure, None))}
            else:
                result[name] = routed_table(losses, sure, config.exits[-1])
    result |= {"reference_2": REFERENCE_2, "reference_3": REFERENCE_3}
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
