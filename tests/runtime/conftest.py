"""One tiny bundle for the whole session, and runners on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from offramp.runtime import Runner


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle that no test may change."""
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    tiny.make_bundle(path)
    return path


@pytest.fixture(scope="session")
def shared_runner(bundle: Path) -> Iterator[Runner]:
    """One open runner; a test that sets its policy sets it first thing."""
    with Runner.open(bundle, threads=1) as runner:
        yield runner
