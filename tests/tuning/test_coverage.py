"""bench/coverage.py in small: certificates are wrong as seldom as they say, and the simulation catches planted bugs."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.policy import Policy
from offramp.tuning.certify import CertifyOptions
from offramp.tuning.risk_tests import betting_p_value, last_rejected_of

BENCH = Path(__file__).parents[2] / "bench"
TRIALS = 2000
MOST = 3  # standard errors


@pytest.fixture(scope="module")
def coverage():
    """The script as a module; by another name than that of a package some have installed."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_coverage", BENCH / "coverage.py")
        module = sys.modules["bench_coverage"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@pytest.mark.parametrize("course", ["ramp", "cliff"])
@pytest.mark.parametrize("kind", ["binary", "binary by betting", "bounded", "signed"])
def test_certificates_are_wrong_as_seldom_as_they_say(coverage, kind, course):
    cell = coverage.Cell(kind, course, num_rows=200, grid=20, max_risk=0.05, delta=0.1)
    (share,) = coverage.shares_violated(cell, TRIALS, (last_rejected_of,))
    assert coverage.standard_errors_above(share, cell.delta, TRIALS) <= MOST


@pytest.mark.parametrize("grid", [5, 60])
def test_choosing_the_first_that_is_not_rejected_is_caught(coverage, grid):
    cell = coverage.Cell("binary", "cliff", num_rows=500, grid=grid, max_risk=0.05, delta=0.1)
    right, one_too_far = coverage.shares_violated(cell, TRIALS, (last_rejected_of, coverage.first_not_rejected))
    assert coverage.standard_errors_above(right, cell.delta, TRIALS) <= MOST
    assert coverage.standard_errors_above(one_too_far, cell.delta, TRIALS) > MOST


def test_the_largest_wealth_of_each_half_is_caught(coverage):
    cell = coverage.Cell("binary by betting", "cliff", num_rows=200, grid=5, max_risk=0.05, delta=0.1)
    found = [
        coverage.shares_violated(cell, TRIALS, (last_rejected_of,), betting)[0]
        for betting in (betting_p_value, coverage.half_split_p_value)
    ]
    right, by_halves = (coverage.standard_errors_above(share, cell.delta, TRIALS) for share in found)
    assert right <= MOST < by_halves


@pytest.mark.parametrize("kind", ["binary", "bounded", "signed"])
def test_the_simulated_risk_is_the_true_one(coverage, kind):
    uniform = np.random.default_rng(0).random(200_000)
    for risk in (0.01, 0.2):
        assert coverage.losses_at(kind, uniform, risk).mean() == pytest.approx(risk, abs=0.002)


@pytest.mark.parametrize("risk", ["consistency", "accuracy_gap_signed"])
def test_certified_policies_keep_their_risk_on_the_population(coverage, risk):
    population = coverage.simulated_trace(20_000, 4, seed=3)
    options = CertifyOptions(max_risk=0.05, confidence=0.9, risk=risk)
    base = Policy("margin", patience=2, temperatures=(1.0,) * 4)
    share = coverage.share_violated_end_to_end(population, base, options, num_rows=300, trials=150)
    assert coverage.standard_errors_above(share, 0.1, 150) <= MOST
