"""What a hierarchical language model on a frozen decoder gains and loses: FFNs skipped, tokens proposed.

Physics: a decoder at batch 1 reads weights, three quarters of a layer's being its FFN's; skipping it for a token saves
that reading, while the router, finding the chosen positions and putting results back cost a dozen small operators per
layer, whether it is skipped or not. A linear shortcut, an eighth of it, stands in. In lossless mode nothing is
lost: a draft token costs the layers to the exit and its small head, verifying a draft costs one token (a chunk of 8
positions costs 1.15 of one), and the share of accepted proposals decides.

`--adaptive` is the bundle of a recipe hierarchical-lm-…, `--lossless` one of lossless-lm-…, `--uncut` that of the same
decoder exported with its final exit alone, whose whole graph in one session is what is compared with. Perplexity is
measured through the bundle, on film reviews that training did not see, at full depth. Rounds are interleaved. Times of
generation are of decoding only. The reference claims 90 % capacity: 1.1x and less than 1 % perplexity, 70 %: 1.3x and
3 %, 55 %: 1.6x and 8 %, 40 %: 1.8x and 12 % (not measured there).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from generation import decoding_seconds
from machine import describe_machine
from smollm2 import Uncut, progress

from offramp.bundle import load_manifest
from offramp.models.datasets import load_imdb
from offramp.policy import Policy
from offramp.runtime.decoder import open_decoder
from offramp.runtime.generator import GenerateOptions, Generator
from offramp.runtime.text import Detokenizer

REFERENCE = {"0.9": (1.1, 1.0), "0.7": (1.3, 3.0), "0.55": (1.6, 8.0), "0.4": (1.8, 12.0)}  # speedup, % perplexity
SPEEDUP = 1.4  # target of the lossless mode
PROMPT, LENGTH = 24, 128  # tokens


def held_out(bundle: Path, count: int, length: int) -> list[list[int]]:
    """The first tokens of reviews that recipes do not train on."""
    tokenizer = Detokenizer((bundle / "tokenizer.json").read_bytes())
    found = (tokenizer.encode(example.text)[:length] for example in load_imdb().test)
    return [tokens for tokens, _ in zip((t for t in found if len(t) == length), range(count), strict=False)]


def scored(decoder: Any, texts: list[list[int]], capacity: float) -> tuple[float, float]:
    """Perplexity at full depth, and seconds, through the bundle: one text after another, as one chunk."""
    decoder.set_capacity(capacity)
    losses, seconds = [], 0.0
    for tokens in texts:
        decoder.clear(0)
        start = time.perf_counter()
        chunk = decoder.read(0, [tokens])
        for index in range(1, decoder.num_exits):
            chunk = decoder.advance(index, 0, [len(tokens)])
        seconds += time.perf_counter() - start
        logits = decoder.logits(decoder.num_exits - 1, chunk.hidden[0, :-1])
        most = logits.max(-1)
        total = most + np.log(np.exp(logits - most[:, None]).sum(-1))
        losses.append(total - logits[np.arange(len(logits)), tokens[1:]])
    return float(np.exp(np.mean(np.concatenate(losses)))), seconds


def capacities(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and speed of every capacity of the bundle."""
    spec = load_manifest(options.adaptive).decoder
    assert spec is not None
    shares = [1.0, *sorted(map(float, spec.capacities), reverse=True)]
    decoder = open_decoder(options.adaptive, load_manifest(options.adaptive), "fp32", options.threads, 1)
    texts = held_out(options.adaptive, options.texts, LENGTH)
    table: dict[str, dict[str, Any]] = {}
    for share in shares:
        perplexity, seconds = scored(decoder, texts, share)
        table[f"{share:g}"] = {"perplexity": round(perplexity, 3), "scoring_s": seconds}
        progress(f"capacity {share:g}: perplexity {perplexity:.2f}, {len(texts) * LENGTH / seconds:.0f} tokens/s")
    prompt = texts[0][:PROMPT]
    uncut = Uncut(options.uncut, options.threads, concat=False)
    times: dict[str, list[float]] = {name: [] for name in ("uncut", *table)}
    with Generator.open(options.adaptive, Policy.full_depth(), threads=options.threads) as generator:
        for turn in range(options.rounds):
            times["uncut"].append(uncut.generate(prompt, options.tokens)[1])
            for share in shares:
                times[f"{share:g}"].append(
                    decoding_seconds(generator, prompt, GenerateOptions(options.tokens, capacity=share))
                )
            progress(f"round {turn + 1}: " + ", ".join(f"{name} {found[-1]:.2f}" for name, found in times.items()))
    full = table["1"]
    for name, row in table.items():
        row["perplexity_increase_percent"] = round(100 * (row["perplexity"] / full["perplexity"] - 1), 2)
        row["scoring_speedup_over_all"] = round(full["scoring_s"] / row["scoring_s"], 3)
        row["ms_per_token"] = round(1e3 * float(np.median(times[name])) / (options.tokens - 1), 3)
        row["speedup_over_all"] = round(float(np.median(times["1"]) / np.median(times[name])), 3)
        row["speedup_over_uncut"] = round(float(np.median(times["uncut"]) / np.median(times[name])), 3)
        row["reference"] = REFERENCE.get(name)
    uncut_ms = round(1e3 * float(np.median(times["uncut"])) / (options.tokens - 1), 3)
    return {"texts": len(texts), "tokens_each": LENGTH, "uncut_ms_per_token": uncut_ms, "capacity": table}


def lossless(options: argparse.Namespace) -> dict[str, Any]:
    """Are tokens those of the uncut decoder, which share of proposals is accepted, how fast is it?"""
    prompts = held_out(options.lossless, options.prompts, PROMPT)
    uncut = Uncut(options.uncut, options.threads, concat=False)
    policy = Policy.thresholds("max_prob", [options.threshold])
    same, exits = 0, []
    seconds: dict[str, list[float]] = {"uncut": [], "lossless": []}
    with Generator.open(options.lossless, policy, threads=options.threads, max_batch=1) as generator:
        how = GenerateOptions(options.tokens, mode="lossless", draft=options.draft)
        for number, prompt in enumerate(prompts):
            wanted, took, _ = uncut.generate(prompt, options.tokens)
            stream = generator.stream([prompt], how)
            found = [next(stream)]
            start = time.perf_counter()
            found += stream
            seconds["lossless"].append((time.perf_counter() - start) / max(1, len(found) - 1))
            seconds["uncut"].append(took / max(1, len(wanted) - 1))
            same += [token.token for token in found] == wanted[: len(found)]
            exits += [token.exit_index for token in found[1:]]
            if number % 20 == 19:
                progress(f"{number + 1} prompts: {same} the same, {np.mean(np.array(exits) == 0):.3f} accepted")
    return {
        "prompts": len(prompts),
        "tokens": options.tokens,
        "same_tokens": same,
        "draft": options.draft,
        "threshold": options.threshold,
        "accepted_share": round(float(np.mean(np.array(exits) == 0)), 4),
        "tokens_per_verification": round(len(exits) / max(1, sum(index > 0 for index in exits)), 3),
        "ms_per_token": {name: round(1e3 * float(np.mean(found)), 3) for name, found in seconds.items()},
        "speedup": round(float(np.sum(seconds["uncut"]) / np.sum(seconds["lossless"])), 3),
        "target": SPEEDUP,
    }


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uncut", type=Path, required=True, help="bundle of the decoder with its final exit alone")
    parser.add_argument("--adaptive", type=Path, help="bundle with routers")
    parser.add_argument("--lossless", type=Path, help="bundle with an exit that proposes")
    parser.add_argument("--texts", type=int, default=24, help="reviews that perplexity is measured on")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", type=int, default=5, help="positions read before they are verified")
    parser.add_argument("--threshold", type=float, default=0.3, help="max_prob below which drafting stops")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few of everything: shows the script, no result")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.prompts, options.tokens, options.rounds = 2, 2, 12, 1
    summary: dict[str, Any] = {"bench": "hierarchical", "machine": describe_machine(), "threads": options.threads}
    if options.adaptive:
        summary |= capacities(options)
    if options.lossless:
        summary["lossless"] = lossless(options)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
