"""What regrouping survivors gains, and what the pool costs. Targets stand beside the figures.

Physics: a segment on few short rows reads all its weights to do little arithmetic, so its latency hardly grows with
rows (weight-bound); after half of 8 rows have left, the other 4 cost nearly what 8 did. Waiting for 4 survivors of
another batch gives that back: the saturated gain is sum_k L_k(8 S_k) / sum_k S_k L_k(8), S_k the share of rows that
reaches segment k. Rows of 64 tokens are arithmetic alone: latency is proportional to rows, the gain is 1 and the pool
must see so from its measured L(b) and leave everything as it is. Below saturation nothing waits, as the executor
never idles, so latency is that of running to completion.

Measured: MiniLM-L6 (pretrained encoder, random exit heads), FP32, one thread per session; thresholds are the medians of
each exit's max_prob over the rows that get there, so half of them leave at each exit. `plain` collects up to 8
requests and calls `runner.run`; `completion` is the pool without costs; `pool` has them. Rounds of the three alternate;
ratios are taken within a round, their medians count, against whichever of the two baselines is better. Requests per
second of CPU time of the executor's thread stand beside those per second: the same ratio on a machine with nothing else
to do, and the one to trust on another. The load generator is a process of its own (load_generator.py). The CPU time per
request is the process's, with FakeEngines whose own time is taken off, clients included. Answers are compared with
those of `runner.run` on each request alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chain_vs_uncut import make_inputs
from load_generator import Load, LoadGenerator, Round, Server
from machine import describe_machine
from pool_stress import cpu_us_per_request, random_load
from transformers import BertConfig, BertModel

from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.models.data import default_encoder_path
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.policy import Policy
from offramp.runtime import BatchCosts, Pool, Result, Runner, measure_batch_costs

EXITS = (1, 2, 3, 4, 5, 6)
BATCH = 8
SHORT, LONG = 4, 64  # tokens
REPORTED = (2, 4, 6, 8)  # tokens of short rows; judged at SHORT
CLIENTS = 8 * BATCH
CPU_JUDGED = 32  # largest batch
TARGET_GAIN, TARGET_LONG, TARGET_P99, TARGET_CPU_US = 1.25, 0.97, 1.10, 12.0

Inputs = dict[str, np.ndarray]


def progress(line: object) -> None:
    print(line, file=sys.stderr, flush=True)


def make_bundle(folder: Path, quick: bool) -> Path:
    """Export the encoder in FP32 with an exit after every layer; with `quick`, a tiny one."""
    config = EncoderConfig(exits=EXITS, early_pooling="mean")
    if quick:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
        small = BertConfig(vocab_size=3000, num_hidden_layers=EXITS[-1], **sizes)
        encoder = EarlyExitEncoder(BertModel(small, add_pooling_layer=False), config).eval()
    else:
        encoder = encoder_from_pretrained(default_encoder_path(), config)
    sequence = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in make_inputs(4, 24).items()},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (1, 128)},
    )
    source = source_from_model("encoder", encoder, example, DEFAULT_OPSET)
    export_bundle(source, folder / "bundle", ExportOptions(precision="fp32"), progress)
    return folder / "bundle"


def make_samples(num_samples: int, tokens: int) -> list[Inputs]:
    """Requests of one row each."""
    ids = np.random.default_rng(tokens).integers(1000, 3000, (num_samples, tokens))
    return [{"input_ids": row[None], "attention_mask": np.ones((1, tokens), np.int64)} for row in ids]


def stacked(samples: list[Inputs]) -> Inputs:
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def halving_policy(runner: Runner, inputs: Inputs) -> Policy:
    """Thresholds at which half of the rows that reach an exit leave there."""
    max_prob = runner.record([inputs]).scores[:, :, 0]  # (N, E)
    limits, here = [], np.ones(len(max_prob), np.bool_)
    for k in range(max_prob.shape[1] - 1):
        limits.append(float(np.median(max_prob[here, k])))
        here &= max_prob[:, k] < limits[-1]
    return Policy.thresholds("max_prob", limits)


class PlainBatcher:
    """The obvious server: what waits, up to 8 requests, in one `runner.run`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._waiting: deque[tuple[Inputs, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def submit(self, inputs: Inputs) -> Future[Result]:
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.append((inputs, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                taken = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            result = self._runner.run(stacked([inputs for inputs, _ in taken]))
            for row, (_, future) in enumerate(taken):
                one = slice(row, row + 1)
                logits = {"logits": result.outputs["logits"][one]}
                arrays = result.prediction[one], result.exit_index[one], result.score[one]
                future.set_result(Result(logits, *arrays, result.reason[one]))


@contextmanager
def servers(runner: Runner, costs: BatchCosts) -> Iterator[dict[str, Server]]:
    """The three ways of serving, all open."""
    plain = PlainBatcher(runner)
    with Pool(runner, BATCH) as completion, Pool(runner, BATCH, costs=costs) as pool:
        yield {
            "plain": Server(plain.submit, [plain.thread]),
            "completion": Server(completion.submit, completion._threads),
            "pool": Server(pool.submit, pool._threads),
        }
        progress(pool.plans)
    plain.close()


def play(
    generator: LoadGenerator, ways: dict[str, Server], load: Load, samples: list[Inputs], num_rounds: int
) -> dict[str, list[Round]]:
    """Rounds of all ways in turn, each round beginning with another; the first is warming up and dropped."""
    names = list(ways)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for current in range(num_rounds + 1):
        for offset in range(len(names)):
            name = names[(current + offset) % len(names)]
            done = generator.drive(load, ways[name], samples)
            if current:
                found[name].append(done)
    return found


def check_answers(rounds: dict[str, list[Round]], runner: Runner, samples: list[Inputs]) -> None:
    alone = [runner.run(sample) for sample in samples]
    expected = np.array([(result.prediction[0], result.exit_index[0]) for result in alone])  # (samples, 2)
    for done in (done for each in rounds.values() for done in each):
        np.testing.assert_array_equal(done.answers, expected[np.arange(len(done.answers)) % len(samples)])


def ratios(rounds: dict[str, list[Round]], what: str) -> dict[str, Any]:
    """Medians over rounds of pool / baseline for `what`, a throughput or a p99."""
    values = {name: np.array([_value(done, what) for done in each]) for name, each in rounds.items()}
    summary: dict[str, Any] = {f"{name}_{what}": round(float(np.median(each)), 3) for name, each in values.items()}
    for base in ("plain", "completion"):
        quotients = values["pool"] / values[base]
        summary[f"pool_by_{base}"] = round(float(np.median(quotients)), 4)
        summary[f"pool_by_{base}_range"] = [round(float(q), 4) for q in (quotients.min(), quotients.max())]
    return summary


def _value(done: Round, what: str) -> float:
    num_requests = len(done.latency_ms)
    if what == "per_second":
        return num_requests / done.seconds
    return num_requests / done.cpu_seconds if what == "per_cpu_second" else float(np.percentile(done.latency_ms, 99))


def measure_tokens(
    generator: LoadGenerator, runner: Runner, tokens: int, num_requests: int, num_rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Closed-loop throughput for rows of `tokens`, and, for SHORT, latency at 0.6 of the capacity found."""
    samples = make_samples(256, tokens)
    runner.policy = halving_policy(runner, stacked(samples))
    costs = measure_batch_costs(runner, stacked(samples), (1, 2, 4, BATCH))
    poisson: dict[str, Any] = {}
    with servers(runner, costs) as ways:
        closed = play(generator, ways, Load(num_requests, clients=CLIENTS), samples, num_rounds)
        check_answers(closed, runner, samples)
        throughput = {
            "tokens": tokens,
            "segment_1_ms": np.round(costs.ms[1], 3).tolist(),
            **ratios(closed, "per_second"),
        }
        throughput["per_cpu_second"] = ratios(closed, "per_cpu_second")
        progress(throughput)
        if tokens == SHORT:
            rate = 0.6 * max(throughput["plain_per_second"], throughput["completion_per_second"])
            open_loop = play(generator, ways, Load(num_requests, rate=rate), samples, num_rounds)
            check_answers(open_loop, runner, samples)
            poisson = {"rate": round(rate, 1), **ratios(open_loop, "p99_ms")}
            progress(poisson)
    return throughput, poisson


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few requests: shows the script, no result"
    )
    options = parser.parse_args()
    num_rounds, num_short, num_long = (1, 64, 32) if options.quick else (options.rounds, 3000, 160)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder, LoadGenerator() as generator:
        bundle = make_bundle(Path(folder), options.quick)
        with Runner.open(bundle, "onnxruntime", threads=1) as runner:
            reported = (SHORT,) if options.quick else REPORTED
            short = {n: measure_tokens(generator, runner, n, num_short, num_rounds) for n in reported}
            long, _ = measure_tokens(generator, runner, LONG, num_long, num_rounds)
    num_fake = 2000 if options.quick else 20000
    cpu = [cpu_us_per_request(batch, face, num_fake) for batch in (BATCH, 32) for face in ("thread", "asyncio")]
    progress(cpu)
    throughput, poisson = short[SHORT]
    summary = {
        "bench": "pool",
        "model": "tiny" if options.quick else "MiniLM-L6",
        "exits": EXITS,
        "batch": BATCH,
        "machine": machine,
        "weight_bound_gain": _worse(throughput, min),
        "weight_bound_gain_per_cpu_second": _worse(throughput["per_cpu_second"], min),
        "target_weight_bound_gain": TARGET_GAIN,
        "compute_bound_ratio": _worse(long, min),
        "compute_bound_ratio_per_cpu_second": _worse(long["per_cpu_second"], min),
        "target_compute_bound_ratio": TARGET_LONG,
        "p99_ratio_at_0.6": _worse(poisson, max),
        "target_p99_ratio_at_0.6": TARGET_P99,
        "cpu_us_per_request": max(case["us"] for case in cpu if case["batch"] == CPU_JUDGED),
        "target_cpu_us_per_request": TARGET_CPU_US,
        "random_load": random_load(num_requests=2000 if options.quick else 100_000),
        "short": [each for each, _ in short.values()],
        "long": long,
        "poisson": poisson,
        "cpu": cpu,
    }
    print(json.dumps(summary))


def _worse(case: dict[str, Any], which: Callable[..., float]) -> float:
    return which(case["pool_by_plain"], case["pool_by_completion"])


if __name__ == "__main__":
    main()
