"""The certificate: there and back through JSON, what it refuses, and for what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from offramp.certificate import RISKS, Certificate, ExitRisk, SourceStatement
from offramp.errors import CertificateError
from offramp.policy import Policy

FILES = ("a" * 64, "b" * 64, "c" * 64)
POLICY = Policy.thresholds("max_prob", [0.9, 0.8])


def make_certificate(**changes: Any) -> Certificate:
    """A certificate with every field filled."""
    certificate = Certificate(
        risk="missed_detection",
        max_risk=0.01,
        confidence=0.95,
        method="exact binomial, fixed sequence",
        num_rows=700,
        losses=2,
        p_value=0.0291,
        upper_bound=0.00897,
        exit_counts=(600, 300, 100),
        mean_depth=1.5,
        backend="onnxruntime",
        precision="fp32",
        files=FILES,
        policy_sha256=POLICY.sha256,
        trace_sha256="d" * 64,
        seed=7,
        class_name="malicious",
        exits=(ExitRisk(600, 1, 0.008), ExitRisk(300, 1, 0.0157), ExitRisk(100, 0, None)),
        sources={
            "mail": SourceStatement(0.975, 400, 0, 0.018, 0.0092, (300, 60, 40), 1.35),
            "web": SourceStatement(0.975, 20, 0, 1.0, 1.0, (0, 0, 20), 3.0, rows_missing=347),
        },
    )
    return replace(certificate, **changes)


def test_a_certificate_survives_its_json() -> None:
    certificate = make_certificate(p_value=1 / 3, losses=0.1 + 0.2)
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert Certificate.from_json(certificate.to_json().encode()).to_json() == certificate.to_json()
    assert certificate.delta == pytest.approx(0.05)
    assert certificate.num_exits == 3


def test_it_holds_for_what_it_was_made_for() -> None:
    assert make_certificate().obstacle(FILES, "onnxruntime", "fp32", POLICY.sha256) == ""


@pytest.mark.parametrize(
    ("running", "message"),
    [
        ((FILES, "tensorrt", "fp32", POLICY.sha256), "for onnxruntime in fp32, running is tensorrt in fp32"),
        ((FILES, "onnxruntime", "fp16", POLICY.sha256), "running is onnxruntime in fp16"),
        ((("a" * 64, "e" * 64, "c" * 64), "onnxruntime", "fp32", POLICY.sha256), "files of segment 1 are not"),
        ((FILES[:2], "onnxruntime", "fp32", POLICY.sha256), "for 3 segments from files, running are 2"),
        ((FILES, "onnxruntime", "fp32", replace(POLICY, patience=2).sha256), "it is for policy"),
    ],
)
def test_it_says_why_it_does_not_hold(running: tuple[Any, ...], message: str) -> None:
    assert message in make_certificate().obstacle(*running)


@pytest.mark.parametrize(
    "changes",
    [
        {"risk": "accuracy"},
        {"max_risk": 0.0},
        {"max_risk": True},
        {"confidence": 1.0},
        {"p_value": 1.5},
        {"p_value": float("nan")},
        {"upper_bound": "0.01"},
        {"num_rows": -1},
        {"exit_counts": (600.0, 300, 100)},
        {"exit_counts": (600, -1, 100)},
        {"files": FILES[:2]},
        {"exits": (ExitRisk(1, 0, 1.0),)},
        {"sources": {"mail": SourceStatement(0.95, 1, 0, 1.0, 1.0, (1,), 1.0)}},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CertificateError, match="certificate: got"):
        make_certificate(**changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\xff",
        "{}",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "exits": [1]}',
        '{"schema": 1, "sources": 1}',
        json.dumps(json.loads(make_certificate().to_json()) | {"colour": "red"}),
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(CertificateError, match="offramp calibrate BUNDLE"):
        Certificate.from_json(text.encode("latin-1"))


@pytest.mark.parametrize("risk", RISKS)
def test_it_can_be_said_in_words(risk: str) -> None:
    words = "\n".join(make_certificate(risk=risk).words())
    assert "at most 1.00%, for every source below" in words
    alone = make_certificate(risk=risk, sources={}, rows_missing=12).words()
    assert alone[0].startswith("full depth: 12 more tested rows")
    assert "at most 1.00%, with 95.0% confidence" in alone[1]
    assert "2 in 700 tested rows" in words
    assert "'web': full depth; 347 more tested rows" in words
    assert ("'malicious'" in words) == (risk == "missed_detection")
