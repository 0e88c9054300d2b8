"""The real encoder, exported once for the whole session, and runners on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from minilm import TEMPERATURES, MiniLM, batches_of, make_minilm

from offramp.runtime import Runner
from offramp.trace import Trace


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> MiniLM:
    """A bundle that no test may change."""
    return make_minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="session")
def runner(minilm: MiniLM) -> Iterator[Runner]:
    """One open runner; a test sets its policy first thing."""
    with Runner.open(minilm.bundle, backend="onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="session")
def trace(minilm: MiniLM, runner: Runner) -> Trace:
    """What every exit says about every sentence, in batches of 32 of their own order."""
    return runner.record(batches_of(minilm.sentences), minilm.labels, TEMPERATURES)
