"""What do exits give a trained model against every fixed depth: accuracy or error, mean depth, and the clock?

Recipes: `regression-ratings` (how positive a sentence is, -4 to 4: values, rows leave by a learned confidence) and
`branchynet-fashion-mnist` (pictures of clothes: classes, rows leave by max_prob). Each is trained as `offramp train`
does with the changes in TRAINED, exported, recorded on validation rows, calibrated on these by `offramp calibrate`'s
own functions, and judged on test rows that chose nothing:

    certified   the bound below holds with 95 % confidence
    no loss     the fastest thresholds that lost nothing on the validation rows, uncertified
    small loss  the same, with a small loss (SMALL_LOSS) allowed
    naive       one threshold of 0.9 on the score

Fixed depths are the same weights cut off at each exit: what one would deploy without offramp. `mixture` is what rows
sent to the neighbouring fixed depths at random would get at the same mean depth: a policy that is no better than
that has learned nothing about rows.

Physics: a row that leaves early saves the later segments and pays for the heads it passed; so single rows gain what
depth says, less a fixed cost of some 0.1 ms per segment, which for a network of a millisecond is much. In a batch of 32
the segments run for whoever is left, so large models gain more than small ones. All alternatives are timed in one
process, interleaved request by request, the uncut model in ONNX Runtime with all its optimisations.

    python bench/fixed_depth.py [RECIPE …] [--set data.path=vaderSentiment-0.5.zip] [--seeds 3] [--quick]

Training (minutes per seed) is done once, in --work. `--quick` needs no data and trains nothing: random weights, which
show that the script works and no more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from timed import progress
from torch import nn

from offramp.bundle import load_manifest
from offramp.commands.benchmark import Answer, compare, reference_answers, runner_answer
from offramp.commands.dataset import load_dataset
from offramp.commands.recipes import Recipe, load_recipe, value_from_text
from offramp.commands.sources import source_from_argument
from offramp.commands.traces import TraceRequest, record_bundle
from offramp.commands.training import load_splits, train_recipe
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.models.branchynet import BranchyNet, BranchyNetConfig
from offramp.models.cascade import CascadeConfig, CascadeTransformer
from offramp.models.checkpoint import load_checkpoint
from offramp.models.data import TextSplits
from offramp.models.images import ImageSplits
from offramp.models.regression import LearnedRegressor, RegressionConfig
from offramp.policy import LEARNED, Policy
from offramp.runtime import Runner
from offramp.trace import Trace, load_trace
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.replay import exit_shares, mean_depth, replay

REGRESSION, BRANCHYNET = "regression-ratings", "branchynet-fashion-mnist"
# What is changed for a training of minutes on one core.
TRAINED: dict[str, dict[str, Any]] = {REGRESSION: {"data.limit": 4000}, BRANCHYNET: {"stage.0.epochs": 1}}
SEEDS = {REGRESSION: 3, BRANCHYNET: 1}
NAIVE = 0.9
SMALL_LOSS = {True: 0.01, False: 0.005}  # of a regression in points of the rating, of classes as a share of the rows
CERTIFIED = {
    True: CertifyOptions(max_risk=0.1, risk="deviation", value_range=1.0),
    False: CertifyOptions(max_risk=0.01, risk="consistency"),
}
ROUNDS = {1: 200, 32: 20}


@dataclass(frozen=True)
class Subject:
    """A bundle, the data to calibrate it on and to judge it by, and how many layers each exit is after."""

    bundle: Path
    validation: str
    test: str
    layers: tuple[int, ...]


def trained_subject(recipe: Recipe, folder: Path) -> Subject:
    """What `recipe` trains, exported; `folder` has its checkpoint already, or gets it."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not (checkpoint / "model.safetensors").is_file() or (checkpoint / "training.pt").is_file():
        train_recipe(checkpoint, recipe, resume=(checkpoint / "training.pt").is_file(), progress=True)
    if not (bundle / "manifest.json").is_file():
        source = source_from_argument(str(checkpoint), (), DEFAULT_OPSET, "", {})
        export_bundle(source, bundle, ExportOptions("fp32"), progress)
    splits = load_splits(recipe)
    data = [write_split(splits, name, folder / name) for name in ("validation", "test")]
    return Subject(bundle, *data, tuple(load_checkpoint(checkpoint).config.exits))


def write_split(splits: TextSplits | ImageSplits, name: str, path: Path) -> str:
    """The rows of a split as a user's file; texts as .jsonl, images as .npz."""
    rows = getattr(splits, name)
    if isinstance(splits, ImageSplits):
        path = path.with_suffix(".npz")
        pixels = rows.inputs["pixels"].astype(np.float32) / 255  # as ArrayRows has them
        np.savez(path, pixels=pixels, labels=rows.targets)
        return str(path)
    path = path.with_suffix(".jsonl")
    names = splits.label_names
    lines = [json.dumps({"text": row.text, "label": names[int(row.label)] if names else row.label}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def quick_subject(name: str, folder: Path) -> Subject:
    """Random weights and random rows, of the same kind."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    arrays: dict[str, Any]
    model: nn.Module
    if name == REGRESSION:
        encoder = CascadeTransformer(CascadeConfig((1, 2), hidden_size=16, num_heads=2, inner_size=16, vocab_size=20))
        encoder.heads = nn.ModuleList()
        model = LearnedRegressor(encoder, 16, RegressionConfig((1, 2)))
        arrays = {"input_ids": random.integers(1, 20, (96, 8)), "attention_mask": np.ones((96, 8), np.int64)}
        labels = random.normal(size=96)
    else:
        model = BranchyNet(BranchyNetConfig((4, 8), num_classes=3, image_size=12))
        arrays = {"pixels": random.random((96, 1, 12, 12), np.float32)}
        labels = random.integers(0, 3, 96)
    example = Example({key: torch.from_numpy(array[:8]) for key, array in arrays.items()})
    source = source_from_model(name, model.eval(), example, DEFAULT_OPSET)
    export_bundle(source, folder / "bundle", ExportOptions("fp32"))
    np.savez(folder / "rows.npz", labels=labels, **arrays)
    return Subject(folder / "bundle", *[str(folder / "rows.npz")] * 2, (1, 2))


def chosen_policies(trace: Trace) -> dict[str, Policy]:
    """The policies that are compared, from validation rows."""
    is_value = trace.is_regression
    score = LEARNED if is_value else "max_prob"
    options = CalibrateOptions(score, 0.0)
    return {
        "certified": certify(trace, Policy(score), CERTIFIED[is_value]).policy,
        "no loss": calibrate(trace, options).policy,
        "small loss": calibrate(trace, replace(options, max_drop=SMALL_LOSS[is_value])).policy,
        "naive": Policy.thresholds(score, [NAIVE] * (trace.num_exits - 1)),
    }


def quality_of(trace: Trace, exit_index: Any) -> float:
    """Accuracy, or the mean absolute error of a regression, when rows leave at `exit_index` (N,)."""
    rows = np.flatnonzero(trace.known)
    at = np.broadcast_to(exit_index, len(trace.labels))[rows]
    if trace.is_regression:
        return float(np.abs(trace.logits[rows, at, 0] - trace.targets[rows]).mean())
    return float((trace.predictions[rows, at] == trace.labels[rows]).mean())


def judged(trace: Trace, policies: dict[str, Policy], layers: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    """Every fixed depth, and every policy, on the rows of `trace`."""
    fixed = [quality_of(trace, k) for k in range(trace.num_exits)]
    depths = [{"layers": depth, "quality": round(value, 4)} for depth, value in zip(layers, fixed, strict=True)]
    found = {}
    for name, policy in policies.items():
        exit_index = replay(policy, trace).exit_index
        mean_layers = float(np.asarray(layers)[exit_index].mean())
        last, early = trace.logits[:, -1], trace.logits[np.arange(len(exit_index)), exit_index]
        changed = np.abs(early - last)[:, 0] if trace.is_regression else early.argmax(1) != last.argmax(1)
        found[name] = {
            "quality": round(quality_of(trace, exit_index), 4),
            "mixture": round(float(np.interp(mean_layers, layers, fixed)), 4),
            "changed": round(float(changed.clip(0, 1).mean() if trace.is_regression else changed.mean()), 4),
            "mean_layers": round(mean_layers, 3),
            "mean_depth": round(mean_depth(exit_index), 3),
            "exit_shares": exit_shares(exit_index, trace.num_exits).round(3).tolist(),
            "limits": [None if limit is None else round(limit, 4) for limit in policy.limits],
        }
    return depths, found


def times_of(subject: Subject, policies: dict[str, Policy], options: argparse.Namespace) -> dict[str, Any]:
    """Times of requests of 1 and 32 rows: every policy, full depth, the uncut model and every fixed depth."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        manifest = load_manifest(subject.bundle)
        answers: dict[str, Answer] = reference_answers(subject.bundle, manifest, options.threads)
        for name, policy in {"full depth": Policy.full_depth(), **policies}.items():
            runner = Runner.open(subject.bundle, "onnxruntime", policy, options.threads)
            answers[name] = runner_answer(stack.enter_context(runner))
        for size, rounds in ROUNDS.items():
            requests = load_dataset(runner, subject.test, "test", size).batches[:rounds]
            nothing = np.empty(0, np.int64)
            measured = compare(answers, requests, nothing, min(rounds, 2) if options.quick else rounds)
            uncut = measured["uncut"].mean_ms
            found[str(size)] = {
                name: {key: round(value, 3) for key, value in asdict(times).items() if value is not None}
                | {"speedup": round(uncut / times.mean_ms, 3)}
                for name, times in measured.items()
            }
    return found


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one trained model."""
    validation = load_trace(record_bundle(subject.bundle, TraceRequest(subject.validation), None, False)[0])
    place = subject.bundle.with_name("test-trace.npz")
    test = load_trace(record_bundle(subject.bundle, TraceRequest(subject.test, "test"), place, False)[0])
    policies = chosen_policies(validation)
    fixed, found = judged(test, policies, subject.layers)
    return {"rows": len(test.labels), "fixed": fixed, "policies": found, "times": times_of(subject, policies, options)}


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the deviation of qualities."""
    qualities = np.array([[exit_["quality"] for exit_ in found["fixed"]] for found in seeds])
    policies: dict[str, Any] = {}
    for name in seeds[0]["policies"]:
        rows = [found["policies"][name] for found in seeds]
        policies[name] = {
            key: round(float(np.mean([row[key] for row in rows])), 4)
            for key in ("quality", "mixture", "changed", "mean_layers", "mean_depth")
        }
        policies[name]["quality_sd"] = round(float(np.std([row["quality"] for row in rows])), 4)
    speedups = {
        size: {
            name: round(float(np.mean([found["times"][size][name]["speedup"] for found in seeds])), 3)
            for name in seeds[0]["times"][size]
        }
        for size in seeds[0]["times"]
    }
    return {
        "fixed": qualities.mean(axis=0).round(4).tolist(),
        "fixed_sd": qualities.std(axis=0).round(4).tolist(),
        "policies": policies,
        "speedup": speedups,
    }


def run_recipe(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train or find, export, calibrate and judge every seed of one recipe."""
    changes = TRAINED[name] | dict(value_from_text(text) for text in options.set)
    seeds = []
    for seed in range(1 if options.quick else options.seeds or SEEDS[name]):
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                seeds.append(measure(quick_subject(name, Path(folder)), options))
            continue
        recipe = load_recipe(name, {**changes, "run.seed": seed})
        seeds.append(measure(trained_subject(recipe, options.work / f"{name}-{seed}"), options))
        progress(f"{name}, seed {seed}: {json.dumps(seeds[-1]['policies'])}")
    return {
        "changes": TRAINED[name],
        "quality": "mean absolute error" if name == REGRESSION else "accuracy",
        "summary": summary(seeds),
        "seeds": seeds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[BRANCHYNET, REGRESSION])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the recipes")
    parser.add_argument("--seeds", type=int, default=0, help=f"0: {SEEDS}")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--work", type=Path, default=Path("bench/work/fixed_depth"))
    parser.add_argument("--quick", action="store_true", help="random weights: shows the script, no result")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    found = {name: run_recipe(name, options) for name in options.recipes}
    print(json.dumps({"bench": "fixed_depth", "machine": machine, "threads": options.threads, "recipes": found}))


if __name__ == "__main__":
    main()
