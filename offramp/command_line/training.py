"""The command that trains."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import JSON, names_from_text, print_result
from offramp.errors import OptionError

POOLING = click.Choice(["window", "mean", "cls"])  # window: a small network over every token and its neighbours
# options -> what they change in the recipe
_CHANGES = {
    "data": "data.name",
    "max_length": "data.max_length",
    "unlabelled": "data.unlabelled",
    "encoder": "model.weights",
    "teacher": "teacher",
    "pooling": "model.pooling",
    "early_pooling": "model.early_pooling",
    "device": "run.device",
    "batch_size": "run.batch_size",
    "seed": "run.seed",
    "epochs": "stage.0.epochs",
    "distil_epochs": "distil_epochs",
    "encoder_lr": "stage.encoder_lr",
    "head_lr": "stage.head_lr",
    "early_weight": "stage.loss.early_weight",
}


def _listed(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the recipes and leave."""
    if not wanted or context.resilient_parsing:
        return
    from offramp.commands.recipes import load_recipe, recipe_names

    for name in recipe_names():
        click.echo(f"{name:36}{load_recipe(name, {}).summary}")
    context.exit()


@click.command()
@click.argument("recipe", default="")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_listed, help="List the recipes.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint directory to write.")
@click.option("--data", help="A data set's name (rotten-tomatoes, imdb, fashion-mnist, …), or a .csv/.jsonl file.")
@click.option("--encoder", help="Pretrained weights: a BertModel's directory, EfficientNet's .pth.")
@click.option("--teacher", help="Checkpoint to learn from too, where stage.loss.teacher_weight is above 0.")
@click.option("--exits", help="Exits after these layers, such as 0,2,4,6 (0: the embeddings); the last is final.")
@click.option("--pooling", type=POOLING, help="What the final exit reads.")
@click.option("--early-pooling", type=POOLING, help="What the other exits read.")
@click.option("--unlabelled", help="imdb, or a .csv/.jsonl/.txt file of texts.")
@click.option("--epochs", type=int, help="Epochs of the first stage.")
@click.option(
    "--distil-epochs",
    type=int,
    help="Epochs of the stages that train early exits on what the final exit answers to unlabelled texts; 0: none.",
)
@click.option("--device", help="auto (the default: a GPU if PyTorch sees one), cpu, cuda, cuda:1 …")
@click.option("--batch-size", type=int, help="Rows of a step.")
@click.option("--encoder-lr", type=float, help="Learning rate of all but the exit heads.")
@click.option("--head-lr", type=float, help="Learning rate of the exit heads.")
@click.option(
    "--early-weight", type=float, help="Loss weight of early exits; the final one has 1. Where loss.rule is early."
)
@click.option("--max-length", type=int, help="Longer texts are cut to this many tokens.")
@click.option("--seed", type=int, help="Of the heads, the order of rows, and how a file of yours is split.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Any other value: stage.0.strategy=berxit")
@click.option("--resume", is_flag=True, help="Go on with the run in OUTPUT that was interrupted or killed.")
@JSON
def train(output: Path, recipe: str, resume: bool, as_json: bool, **options: Any) -> None:
    """Train a model with exits from RECIPE, a name that --list shows or a .toml file.

    Without one it is minilm-rotten-tomatoes: MiniLM-L6 learns Rotten Tomatoes, all exits together (joint weighted
    loss), then the early ones alone. Options change the recipe's values; what is not given stays as the recipe has it.
    A run that was killed goes on with --resume where it stopped.
    """
    # Read when torch is imported: spinning threads cost 3 to 6 times the time beside any other work (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from offramp.commands.recipes import value_from_text
    from offramp.commands.training import TrainRequest, train_checkpoint

    overrides = {_CHANGES[name]: options[name] for name in _CHANGES if options[name] is not None}
    if options["exits"] is not None:
        overrides["model.exits"] = _layers(options["exits"])
    overrides |= dict(value_from_text(change) for change in options["changes"])
    report = train_checkpoint(output, TrainRequest(recipe, overrides), resume, progress=not as_json)
    exits = [f"{found:.3f}" for found in report.validation]
    text = f"{output}: validation {report.measure} per exit {' '.join(exits)}, {report.seconds:.0f} s"
    print_result(as_json, dataclasses.asdict(report), [text, f"next: offramp export {output} -o BUNDLE"])


def _layers(text: str) -> list[int]:
    try:
        return [int(layer) for layer in names_from_text(text)]
    except ValueError:
        raise OptionError(f"--exits: got {text!r}, expected numbers of layers such as 0,2,6") from None
