"""The EAT evaluation's figures against those worked out by hand."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.pruning import Pruning
from offramp.policy import Policy
from offramp.tuning.certify import CertifyOptions
from tests.models.tiny_encoder import TINY_BERT, tiny_bert
from tests.tuning.traces import random_trace, trace_by_hand

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # scripts there import each other by name

from eat_points import AS_STATIC, TAUS, Point, flops_of, points_of, worth_of
from eat_table import COLUMNS, against_dense, csv_of, over_seeds, published

WIDTH, INNER = TINY_BERT.hidden_size, TINY_BERT.intermediate_size


def layer_flops(tokens: int) -> int:
    """Queries, keys, values and output; scores and their sums; the feed-forward network."""
    return 2 * (4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 2 * tokens * WIDTH * INNER)


def test_flops_are_those_of_the_layers_and_heads() -> None:
    config = EncoderConfig(exits=(2, 4), pooling="cls", early_pooling="cls", pruning=Pruning((2,), 0.3, min_tokens=1))
    model = EarlyExitEncoder(tiny_bert(), config).eval()
    norms = 2 * 2  # the products that make a norm of every token's state: two equal columns
    for tokens, found in flops_of(model, np.array([11, 5, 11])).items():
        kept = -(-7 * (tokens - 1) // 10) + 1
        head = 2 * WIDTH * 2
        first = 2 * layer_flops(tokens) + norms * tokens * WIDTH + head
        assert found.tolist() == [first, first + 2 * layer_flops(kept) + head]


def test_what_a_policy_is_worth_by_hand() -> None:
    trace = trace_by_hand(
        predictions=[[1, 1], [0, 1], [1, 0], [0, 0]],
        confidences=[[0.95, 0.99], [0.6, 0.9], [0.92, 0.8], [0.91, 0.7]],
        labels=[1, 1, 0, 0],
    )
    retention = np.array([[1, 0.5], [1, 0.5], [0.8, 0.4], [0.6, 0.2]], np.float32)
    trace = replace(trace, lengths=np.array([10, 10, 20, 20]), retention=retention)
    point = Point("eat", "0.90", Policy.thresholds("max_prob", [0.9]))
    flops = {10: np.array([1.0, 2.0]), 20: np.array([3.0, 8.0])}
    found = worth_of(point, trace, (4, 6), flops, dense_flops=10.0)
    # row 1 goes on; row 2 leaves with a wrong answer that full depth would have mended
    assert found == {
        "accuracy": 3 / 4,
        "avg_depth": (4 + 6 + 4 + 4) / 4,
        "avg_retention": pytest.approx((0.5 + 0.5 + 0.4 + 0.2) / 4),
        "retention_at_exit": pytest.approx((1 + 0.5 + 0.8 + 0.6) / 4),
        "flops": (1 + 2 + 3 + 3) / 4 / 10,
        "shares": [0.75, 0.25],
        "agreement": 3 / 4,
    }


def test_points_are_the_papers_the_certified_and_those_chosen_on_validation() -> None:
    validation = random_trace(600, 3, seed=2, num_classes=2)
    certified = Policy.thresholds("max_prob", [0.97, 0.9])
    points = points_of(validation, certified, CertifyOptions(max_risk=0.01), target_speedup=1.2)
    by_key = {point.key: point for point in points}
    assert len(by_key) == len(points)
    assert [by_key[f"eat {tau:.2f}"].policy.limits for tau in TAUS] == [(tau, tau) for tau in TAUS]
    assert by_key["eat, certified risk 0.01"].policy == certified
    assert by_key["eat, patience agree"].policy.patience == 2
    assert AS_STATIC in by_key
    slow = points_of(validation, certified, CertifyOptions(), target_speedup=100.0)
    assert AS_STATIC not in {point.model for point in slow}


def test_the_table_over_seeds_by_hand() -> None:
    def row(model: str, ms: float, right: float) -> dict[str, object]:
        return {"model": model, "tau": "", "latency_ms": ms, "p50_ms": ms / 2, "accuracy": right, "shares": [1.0]}

    seeds = [
        {"dense": row("dense", 10.0, 0.90), "eat": row("eat", 5.0, 0.88)},
        {"dense": row("dense", 12.0, 0.92), "eat": row("eat", 3.0, 0.92), "other": row("other", 1.0, 1.0)},
    ]
    for rows in seeds:
        against_dense(rows, "dense")
    dense, eat = over_seeds(seeds)  # what one seed lacks is left out
    assert (dense["speedup_vs_dense"], dense["delta_acc_pp"]) == (1.0, 0.0)
    assert eat["speedup_vs_dense"] == (10 / 5 + 12 / 3) / 2
    assert eat["speedup_p50"] == eat["speedup_vs_dense"]
    assert eat["delta_acc_pp"] == pytest.approx((-2 + 0) / 2)
    assert eat["delta_acc_pp_sd"] == pytest.approx(2**0.5)
    assert "throughput" not in eat
    read = list(csv.DictReader(io.StringIO(csv_of([dense, eat], COLUMNS))))
    assert read[1]["latency_ms"] == "4.0000"
    assert read[1]["throughput"] == ""


def test_published_speedups_follow_from_published_latencies() -> None:
    """A slip of the pen would show, but for the rounding of the paper's two decimals."""
    rows = published()
    dense = {row["task"]: row for row in rows if row["model"] == "bert"}
    assert len(rows) == 18
    for row in rows:
        base = dense[row["task"]]
        assert float(base["latency_ms"]) / float(row["latency_ms"]) == pytest.approx(
            float(row["speedup_vs_bert"]), abs=0.011
        )
        difference = 100 * (float(row["accuracy"]) - float(base["accuracy"]))
        assert difference == pytest.approx(float(row["delta_acc_pp"]), abs=0.011)
