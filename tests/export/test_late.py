"""Late inputs: given to the segment that reads them, never carried; from the cut to the runner's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.bundle import load_manifest
from offramp.errors import CutError
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.chain import open_session
from offramp.export.cut import segments_from_graph
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.roles import Roles
from offramp.export.source import ModelSource, source_from_model
from offramp.policy import Policy
from offramp.runtime import Runner
from tests.export import models

LATE = ("scale", "shift")
FUSION_ATOL = 1e-6  # docs/tolerances.md


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return replace(source_from_model("late", *models.late_bias(), DEFAULT_OPSET), late=LATE)


@pytest.fixture(scope="module")
def bundle(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("late") / "bundle"
    export_bundle(source, path, ExportOptions(precision="fp32"))
    return path


def test_a_late_input_goes_to_the_segments_that_read_it(bundle: Path) -> None:
    first, second = load_manifest(bundle).segments
    assert (first.inputs, second.inputs) == (("x", "scale"), LATE)
    assert [tensor.shape[1:] for tensor in first.carry_out] == [(8,)]  # the hidden state, and not the factor


def test_without_being_late_it_is_carried(source: ModelSource) -> None:
    cut = segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example)
    assert [segment.inputs for segment in cut.segments] == [("x", *LATE), ()]
    assert len(cut.segments[0].carry_out) == 3


@pytest.mark.parametrize("limit", [None, 0.45, 0.0])
def test_the_runner_gives_late_inputs_of_the_rows_that_go_on(bundle: Path, source: ModelSource, limit: float) -> None:
    random = np.random.default_rng(3)
    inputs = {spec.name: random.random((40, *spec.shape[1:]), np.float32) for spec in source.inputs}
    expected = open_session(source.graph).run(list(source.exits), inputs)
    with Runner.open(bundle, policy=Policy.thresholds("max_prob", [limit])) as runner:
        result = runner.run(inputs)  # more rows than the bundle takes at once
    wanted = np.where(result.exit_index[:, None] == 0, expected[0], expected[1])
    np.testing.assert_allclose(result.outputs["logits"], wanted, atol=FUSION_ATOL)
    share = (result.exit_index == 0).mean()
    assert share == {None: 0, 0.0: 1}[limit] if limit != 0.45 else 0 < share < 1


def test_not_every_input_can_be_late(source: ModelSource) -> None:
    with pytest.raises(CutError, match="must not be late"):
        segments_from_graph(
            source.graph, source.exits, source.inputs, source.dimensions, source.example, Roles(late=("x", *LATE))
        )
