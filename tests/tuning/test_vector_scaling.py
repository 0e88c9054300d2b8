"""Vector scaling: found again where it was put in, and not believed where it was not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from offramp.errors import DataError
from offramp.trace import UNKNOWN
from offramp.tuning.temperature import fit_temperature, nll
from offramp.tuning.vector_scaling import fit_vector, vector_scaling


def sampled(num_rows, weights, offsets, seed=0):
    """Logits, and labels drawn from softmax(weights * logits + offsets)."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, len(weights))) * 2 + 1
    return logits, (logits * weights + offsets + random.gumbel(size=logits.shape)).argmax(axis=1)


def test_it_is_found_again() -> None:
    weights, offsets = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.25, 0.75])
    logits, labels = sampled(20_000, weights, offsets)
    found = vector_scaling(logits, labels)
    assert found.weights == pytest.approx(weights, abs=0.08)  # four standard errors at this many rows
    assert found.offsets == pytest.approx(offsets, abs=0.08)
    assert found.is_worth_it
    assert found.nll_vector < found.nll_temperature < found.nll_unscaled
    assert found.gain == pytest.approx(found.nll_temperature - found.nll_vector)
    assert 0.05 < found.changed < 0.5


def test_newton_finds_what_a_slow_search_finds() -> None:
    logits, labels = sampled(150, np.array([0.7, 1.2, 1.5]), np.array([0.5, 0.0, -0.5]), seed=1)

    def loss(parameters):
        return nll(logits * parameters[:3] + parameters[3:], labels)

    slow = minimize(loss, [1.0, 1, 1, 0, 0, 0], method="Nelder-Mead", options={"maxiter": 5000, "fatol": 1e-12})
    weights, offsets = fit_vector(logits, labels)
    assert loss(np.concatenate([weights, offsets])) <= slow.fun + 1e-7
    assert offsets.sum() == pytest.approx(0, abs=1e-12)


def test_where_a_temperature_is_enough_it_is_not_believed() -> None:
    believed = 0
    for seed in range(20):
        logits, labels = sampled(300, np.full(3, 0.5), np.zeros(3), seed)
        found = vector_scaling(logits, labels)
        believed += found.is_worth_it
        assert found.nll_temperature < found.nll_unscaled
    assert believed <= 1  # two standard errors


def test_likelihoods_are_of_rows_that_the_fit_has_not_seen() -> None:
    logits, labels = sampled(200, np.array([0.5, 2.0]), np.zeros(2), seed=4)
    total = 0.0
    for fold in (0, 1):
        seen, unseen = np.arange(200) % 2 != fold, np.arange(200) % 2 == fold
        total += nll(logits[unseen], labels[unseen], fit_temperature(logits[seen], labels[seen])) / 2
    assert vector_scaling(logits, labels).nll_temperature == pytest.approx(total)


def test_rows_that_a_line_separates_and_classes_that_never_come() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [0.0, 3.0, -1.0]])
    found = vector_scaling(logits, np.array([0, 0, 1, 1]))
    assert np.isfinite([*found.weights, *found.offsets, found.nll_vector]).all()
    assert found.changed == 0


def test_it_needs_labels() -> None:
    with pytest.raises(DataError, match="got 1 labelled rows, expected at least 2"):
        vector_scaling(np.zeros((3, 2)), np.array([0, UNKNOWN, UNKNOWN]))
