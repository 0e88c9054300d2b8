"""Evidence for the report's tests: random traces of every legal shape, and a manifest that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offramp.bundle import ExitSpec, Manifest, PolicyRecord
from offramp.certificate import Certificate, SourceStatement
from offramp.policy import Policy
from offramp.report.report import Evidence
from offramp.trace import UNKNOWN, Trace
from tests.tuning.traces import random_trace

FILES = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def manifest(num_exits: int, num_classes: int, labels: tuple[str, ...] = (), name: str = "small") -> Manifest:
    exits = tuple(ExitSpec(f"logits_{k}", num_classes) for k in range(num_exits))
    return Manifest(name, (), {}, exits, (), PolicyRecord(""), "", labels)


def small_trace(
    num_rows: int = 120, num_exits: int = 4, num_classes: int = 3, seed: int = 0, *, labelled: bool = True, **more: Any
) -> Trace:
    """A random trace that belongs to `manifest` and ran FILES; `more` replaces fields."""
    trace = random_trace(num_rows, num_exits, seed, num_classes)
    labels = trace.labels if labelled else np.full(num_rows, UNKNOWN)
    costs_ms = np.arange(1.0, num_exits + 1)
    files = FILES if num_exits == len(FILES) else ()
    changes = {"labels": labels, "costs_ms": costs_ms, "files": files, **more}
    return replace(trace, fingerprint=manifest(num_exits, num_classes).fingerprint, **changes)


def with_retention(trace: Trace, seed: int = 0) -> Trace:
    """`trace` with rows of 3 to 60 tokens, of which every exit has fewer."""
    generator = np.random.default_rng(seed)
    num_rows, num_exits = trace.predictions.shape
    kept = generator.uniform(0.3, 1, (num_rows, num_exits)).cumprod(axis=1).astype(np.float32)
    return replace(trace, retention=kept, lengths=generator.integers(3, 61, num_rows))


def evidence(trace: Trace | None = None, policy: Policy | None = None, **more: Any) -> Evidence:
    """Evidence about a small trace, under thresholds of 0.7 unless said otherwise."""
    trace = small_trace() if trace is None else trace
    policy = Policy.thresholds("max_prob", [0.7] * (trace.num_exits - 1)) if policy is None else policy
    fitting = manifest(trace.num_exits, trace.logits.shape[2], more.pop("labels", ()), more.pop("name", "small"))
    return Evidence("my/bundle", fitting, policy, trace, **more)


def certificate(trace: Trace, policy: Policy, **changes: Any) -> Certificate:
    """A certificate that holds for `trace` and `policy`, with two sources."""
    sources = {
        "kiosk": SourceStatement(0.975, 400, 0, 0.02, 0.009, (1,) * trace.num_exits, 2.0),
        "branch": SourceStatement(0.975, 40, 0, 0.6, 0.09, (1,) * trace.num_exits, 4.0, rows_missing=268),
    }
    values: dict[str, Any] = {
        "risk": "consistency",
        "max_risk": 0.02,
        "confidence": 0.95,
        "method": "exact binomial, fixed sequence",
        "num_rows": 1200,
        "losses": 3,
        "p_value": 0.001,
        "upper_bound": 0.0065,
        "exit_counts": (300,) * trace.num_exits,
        "mean_depth": 2.5,
        "backend": trace.backend,
        "precision": trace.precision,
        "files": trace.files,
        "policy_sha256": policy.sha256,
        "trace_sha256": trace.sha256,
        "sources": sources,
    }
    return Certificate(**{**values, **changes})
