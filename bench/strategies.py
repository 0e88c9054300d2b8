"""Does it matter how exits are trained? One model, the same data and number of epochs, one strategy after another.

Each run is a recipe with other stages; all end after EPOCHS epochs over the training rows, so that none has seen more.
joint: all exits together, early ones at the recipe's early_weight; linear: exit k at (k + 1) / E; alternating: even
steps the early heads alone, odd steps the rest; berxit: even steps all, odd steps the final exit; two_stage: a final
exit, then heads on its frozen layers; self_distillation: the same, the heads on what the final exit answers;
calibrated: joint and the temperature-scaled loss; layer_dropout: joint with layers skipped.

Measured on test rows that chose nothing: the accuracy of every exit, and the area under the frontier of accuracy over
mean depth for one threshold on max_prob, the same for all exits; for a regression minus the mean absolute error, with
the threshold on the learned confidence. Physics: rows that leave at an exit get that exit's answer, and cost counts the
layers below it; nothing is timed here.

    python bench/strategies.py [--recipe NAME] [--set NAME=VALUE …] [--seeds 3] [--work DIRECTORY] [--quick]

A finished run is not trained again, a killed one goes on where it was. `--quick` trains two strategies of
a tiny model in a directory that it removes. Beside other
work, run it with OMP_WAIT_POLICY=PASSIVE (docs/log.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import describe_machine

from offramp.commands.recipes import Recipe, load_recipe, value_from_text
from offramp.commands.training import load_splits, rows_of, train_recipe
from offramp.errors import OptionError
from offramp.models.checkpoint import load_checkpoint
from offramp.models.data import TextSplits
from offramp.models.evaluate import Outcome, area_under, frontier, outcome_of
from offramp.models.plan import Stage
from offramp.storage import write_file

EPOCHS = 3
QUICK = {"data.limit": 256, "model.hidden_size": 32, "model.num_heads": 2, "model.exits": [1, 2]}
QUICK_RECIPE, QUICK_STRATEGIES = "cascade-rotten-tomatoes", "joint,two_stage"


def stages_of(first: Stage) -> dict[str, tuple[Stage, ...]]:
    """The strategies: stages with the rates of the recipe's first one, whatever its rule of weights is."""
    loss = replace(first.loss, rule="early")
    whole = replace(first, epochs=EPOCHS, strategy="joint", loss=loss)
    most, last = replace(whole, epochs=EPOCHS - 1), replace(whole, epochs=1)
    found = {
        "joint": (whole,),
        "linear": (replace(whole, loss=replace(loss, rule="linear")),),
        "alternating": (replace(whole, strategy="alternating", loss=replace(loss, rule="equal")),),
        "berxit": (replace(whole, strategy="berxit", loss=replace(loss, rule="equal")),),
        "two_stage": (replace(most, strategy="final"), replace(last, strategy="early_heads")),
        "self_distillation": (replace(most, strategy="final"), replace(last, strategy="self_distillation")),
        "joint_then_self_distillation": (most, replace(last, strategy="self_distillation")),
        "layer_dropout": (replace(whole, layer_dropout=0.1),),
    }
    if not loss.confidence_weight:  # classes have a temperature, values have not
        found["calibrated"] = (replace(whole, loss=replace(loss, calibration_weight=0.5)),)
    return found


def measured(outcome: Outcome, depths: Sequence[int]) -> dict[str, Any]:
    """Quality of every exit, the area under the frontier, and what fixed and adaptive depth give at half the depth."""
    early = slice(0, len(depths) - 1)
    if np.issubdtype(outcome.targets.dtype, np.floating):
        quality = -np.abs(outcome.logits[:, :, 0] - outcome.targets[:, None])  # (N, E) <= 0
        sure = outcome.learned[:, early]
    else:
        quality = (outcome.logits.argmax(-1) == outcome.targets[:, None]).astype(np.float64)
        sure = torch.from_numpy(outcome.logits).softmax(-1).amax(-1).numpy()[:, early]
    points = frontier(quality, sure, depths)
    affordable = points[points[:, 0] <= depths[-1] / 2, 1]
    fixed = [float(quality[:, k].mean()) for k, depth in enumerate(depths) if depth <= depths[-1] / 2]
    return {
        "exits": [round(float(found), 4) for found in quality.mean(axis=0)],
        "area": round(area_under(points), 4),
        "half_depth": {
            "adaptive": round(float(affordable.max()), 4) if len(affordable) else None,
            "fixed": round(max(fixed), 4) if fixed else None,
        },
        "frontier": [[round(float(value), 4) for value in point] for point in points[:: max(1, len(points) // 20)]],
    }


def run_one(work: Path, name: str, recipe: Recipe, quick: bool) -> dict[str, Any]:
    """Train one strategy with one seed unless that is done, and measure it on test."""
    folder = work / f"{name}-{recipe.run.seed}"
    result = folder.with_suffix(".json")
    if result.is_file():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    started = time.monotonic()
    if not (folder / "model.safetensors").is_file() or (folder / "training.pt").is_file():
        train_recipe(folder, recipe, resume=(folder / "training.pt").is_file(), progress=True)
    checkpoint, splits = load_checkpoint(folder), load_splits(recipe)
    held = splits.test[:200] if quick and isinstance(splits, TextSplits) else splits.test
    test = rows_of(checkpoint, replace(splits, validation=held)).validation  # type: ignore[arg-type]
    exits = checkpoint.config.exits
    found = measured(outcome_of(checkpoint.model, test), exits) | {"seconds": round(time.monotonic() - started)}
    write_file(result, (json.dumps(found) + "\n").encode())
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    exits, areas = np.array([run["exits"] for run in runs]), np.array([run["area"] for run in runs])
    return {
        "exits": exits.mean(axis=0).round(4).tolist(),
        "exits_sd": exits.std(axis=0).round(4).tolist(),
        "area": round(float(areas.mean()), 4),
        "area_sd": round(float(areas.std()), 4),
        "half_depth": [run["half_depth"] for run in runs],
        "seeds": len(runs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="patience-rotten-tomatoes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="strategies, with commas between")
    parser.add_argument("--work", type=Path, default=Path("bench/work/strategies"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        torch.set_num_threads(1)  # for sizes at which threads only wait for each other
        options.recipe, options.only, options.seeds = QUICK_RECIPE, QUICK_STRATEGIES, 1
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))
    else:
        compare(options, options.work / options.recipe)


def compare(options: argparse.Namespace, work: Path) -> None:
    """Run what is asked for in `work` and print it."""
    changes = dict(value_from_text(text) for text in options.set) | (QUICK if options.quick else {})
    recipe = load_recipe(options.recipe, changes)
    strategies = stages_of(recipe.stages[0])
    names = options.only.split(",") if options.only else list(strategies)
    if unknown := set(names) - set(strategies):
        raise OptionError(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(strategies)}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in list(results):
            one = replace(recipe, stages=strategies[name], run=replace(recipe.run, seed=seed))
            try:
                results[name].append(run_one(work, name, one, options.quick))
            except OptionError as exc:  # BranchyNet has no layers to drop
                if options.only or len(results) == 1:  # asked for by name, or refused whatever the strategy is
                    raise
                print(f"{name} is left out: {exc}", file=sys.stderr)
                del results[name]
                continue
            print(f"seed {seed} {name:30} exits {results[name][-1]['exits']} area {results[name][-1]['area']}")
    found = {name: summary(runs) for name, runs in results.items()}
    print(
        json.dumps(
            {"bench": "strategies", "machine": describe_machine(), "recipe": options.recipe, "strategies": found}
        )
    )


if __name__ == "__main__":
    main()
