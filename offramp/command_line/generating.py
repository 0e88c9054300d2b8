"""Commands for decoders: generate, score."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import BUNDLE, JSON, SCORE, THREADS, print_result
from offramp.errors import OptionError


@click.command()
@BUNDLE
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; several are batched.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--mode",
    type=click.Choice(["deferred", "copy", "lossless"]),
    default="deferred",
    show_default=True,
    help="Layers that a token skipped: filled exactly when needed; from its state at the exit; or proposed tokens are "
    "verified, which gives the text of full depth.",
)
@click.option("--draft", default=4, show_default=True, help="Tokens read before they are verified (lossless).")
@click.option(
    "--threshold", default="", metavar="T[,T…]", help="Max. probability per exit, - closes it.  [the bundle's]"
)
@click.option("--capacity", default=1.0, show_default=True, help="Share of FFNs that run, of a model with routers.")
@click.option("--temperature", default=0.0, show_default="greedy")
@click.option("--top-k", default=0, show_default="all")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--max-batch", default=0, show_default="8", help="Prompts that are continued together.")
@click.option("--precision", default="fp32", show_default=True)
@THREADS
@JSON
def generate(bundle: Path, prompts: tuple[str, ...], threshold: str, as_json: bool, **options: Any) -> None:
    """Continue prompts with a decoder's bundle; tokens leave at the exits that its policy opens."""
    from offramp.policy import Policy
    from offramp.runtime.generator import GenerateOptions, Generator
    from offramp.runtime.sampling import Sampling

    policy = Policy.thresholds("max_prob", _limits(threshold)) if threshold else None
    sampling = Sampling(options["temperature"], options["top_k"], options["top_p"], options["seed"])
    how = GenerateOptions(
        options["max_new_tokens"], sampling, (), options["mode"], options["draft"], options["capacity"]
    )
    opening = {name: options[name] for name in ("precision", "threads", "max_batch")}
    with Generator.open(bundle, policy, **opening) as generator:
        if as_json or len(prompts) > 1:
            found = generator.generate(prompts, how)
            print_result(as_json, [dataclasses.asdict(one) for one in found], [one.text for one in found])
            return
        tokens: list[int] = []
        shown = ""
        for token in generator.stream(prompts, how):
            tokens.append(token.token)
            text = generator.decode(tokens)
            if not text.endswith("\ufffd"):  # a character of several tokens is not whole yet
                click.echo(text[len(shown) :], nl=False)
                shown = text
        click.echo()


@click.command()
@BUNDLE
@click.option("--data", required=True, help="Texts: a .txt (one per line), .csv or .jsonl file, - for stdin; or .npz.")
@click.option("--limit", default=0, show_default="all", help="Score this many texts, the first ones.")
@SCORE
@click.option("--threshold", default="", metavar="T[,T…]", help="Thresholds per exit, - closes it.  [the bundle's]")
@click.option("--chunk", default=128, show_default=True, help="Positions of a text that are read at once.")
@click.option("--max-batch", default=0, show_default="8", help="Texts that are scored together.")
@click.option("--precision", default="fp32", show_default=True)
@THREADS
@JSON
def score(bundle: Path, data: str, limit: int, score: str, threshold: str, as_json: bool, **options: Any) -> None:
    """Perplexity of texts, and at which exits their tokens left. Longer texts than the bundle takes are cut."""
    from offramp.commands.scoring import score_texts
    from offramp.policy import Policy
    from offramp.runtime.scorer import Scorer

    policy = Policy.thresholds(score, _limits(threshold)) if threshold else None
    with Scorer.open(bundle, policy, **options) as scorer:
        report = score_texts(scorer, data, limit)
    print_result(as_json, dataclasses.asdict(report), report.lines())


def _limits(text: str) -> list[float | None]:
    """Thresholds from "0.9,-,0.8"."""
    try:
        return [None if part.strip() == "-" else float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--threshold {text}: expected numbers and - with commas between") from None
