"""What it gains to cut off padding that all rows of a batch have by now. Reference: the same runner without.

Physics: a batch is computed as wide as its longest row, and the work of a segment is nearly proportional to rows times
columns. The longest of 32 sentences is about twice as long as their mean; when rows have left, the longest of those
that stay is shorter, and the columns between need not be computed. What is cut is copied, once per boundary: memory
traffic of megabytes, beside arithmetic of gigaflops. A request that came wider than its own rows need, as services pad
to a fixed width, loses all of that at entry. With one row per request nothing is cut and nothing may be lost.

Measured: MiniLM-L6 (pretrained encoder, random exit heads) with exits after layers 2, 4 and 6, on real sentences
(Rotten Tomatoes, test split) in random order; the thresholds let half of the rows leave at each exit, whatever their
length. One runner cuts, the other has the manifest without `trims`; they share their engines and are interleaved
request by request. `ratio` is the sum of medians with cutting over that without: below 1 is a gain.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from chain_vs_uncut import MAX_LENGTH, make_encoder
from machine import describe_machine
from subject import VOCABULARY, Inputs, encoder_source
from timed import progress

from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.models.data import default_encoder_path, load_rotten_tomatoes, load_tokenizer, token_ids
from offramp.models.rows import padded
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms

EXITS = (2, 4, 6)
CASES = ((32, 0), (32, MAX_LENGTH), (8, 0), (8, MAX_LENGTH), (1, 0))  # (batch, padded to; 0: to the longest)
WARMUP = 2


def make_requests(batch: int, width: int, num_requests: int) -> list[Inputs]:
    """Sentences in random order, padded to the longest or to `width`; ids fit the vocabulary of the tiny model too."""
    texts = [example.text for example in load_rotten_tomatoes().test]
    order = np.random.default_rng(0).permutation(len(texts))[: batch * num_requests]
    tokenizer = load_tokenizer(default_encoder_path() / "tokenizer.json", MAX_LENGTH)
    rows = token_ids(tokenizer, [texts[position] for position in order])
    requests = []
    for start in range(0, len(rows), batch):
        ids, mask = padded(rows[start : start + batch])
        more = ((0, 0), (0, max(0, width - mask.shape[1])))
        requests.append({"input_ids": np.pad(ids % VOCABULARY, more), "attention_mask": np.pad(mask, more)})
    return requests


def make_bundle(folder: Path, quick: bool) -> Path:
    """Export the encoder in FP32, verified on sentences; its manifest says whether padding may be cut off."""
    batches = tuple(make_requests(8, 0, 4))
    source = encoder_source("encoder", make_encoder(EXITS, quick), batches[0], MAX_LENGTH)
    options = ExportOptions(precision="fp32")
    manifest = export_bundle(replace(source, calibration=batches), folder / "bundle", options, progress)
    assert manifest.trims, manifest.parity["trimming"]
    return folder / "bundle"


def half_leave(runner: Runner) -> Policy:
    """Thresholds at the medians of those that are still there."""
    scores = runner.record(make_requests(32, 0, 4)).scores[:, :, 0]  # (N, E)
    limits = []
    for k in range(len(EXITS) - 1):
        limits.append(float(np.median(scores[:, k])))
        scores = scores[scores[:, k] < limits[-1]]
    return Policy.thresholds("max_prob", limits)


def measure(cutting: Runner, plain: Runner, case: tuple[int, int], num_requests: int, rounds: int) -> dict[str, float]:
    """Milliseconds per request with and without, and their ratio."""
    requests = make_requests(*case, num_requests)
    for request in requests:
        np.testing.assert_array_equal(cutting.run(request).outputs["logits"], plain.run(request).outputs["logits"])
    calls: dict[str, Callable[[], object]] = {}
    for position, request in enumerate(requests):
        pair = {"cutting": cutting, "plain": plain}
        for name in sorted(pair, reverse=position % 2 > 0):  # the second finds the request in the caches
            calls[f"{name} {position}"] = lambda runner=pair[name], request=request: runner.run(request)
    medians = {name: float(np.median(times)) for name, times in interleaved_ms(calls, rounds, WARMUP).items()}
    with_ms = sum(value for name, value in medians.items() if name.startswith("cutting")) / len(requests)
    without_ms = sum(value for name, value in medians.items() if name.startswith("plain")) / len(requests)
    found = {"batch": case[0], "padded_to": case[1], "plain_ms": round(without_ms, 3), "cutting_ms": round(with_ms, 3)}
    return {**found, "ratio": round(with_ms / without_ms, 4)}


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=12, help="per case")
    parser.add_argument("--rounds", type=int, default=9, help="times every request is asked")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    options = parser.parse_args()
    num_requests, rounds = (2, 2) if options.quick else (options.requests, options.rounds)
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
        bundle = make_bundle(Path(folder), options.quick)
        with Runner.open(bundle, "onnxruntime", threads=options.threads) as cutting:
            cutting.policy = half_leave(cutting)
            plain = Runner(cutting.engines, replace(cutting.manifest, trims={}), cutting.policy, backend="onnxruntime")
            cases = []
            for case in CASES:
                cases.append(measure(cutting, plain, case, num_requests, rounds))
                progress(str(cases[-1]))
    summary = {
        "bench": "trimming",
        "model": "tiny" if options.quick else "MiniLM-L6",
        "machine": describe_machine(),
        "threads": options.threads,
        "ratio_batch_32": cases[0]["ratio"],
        "ratio_batch_32_padded": cases[1]["ratio"],
        "ratio_batch_1": cases[-1]["ratio"],
        "cases": cases,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
