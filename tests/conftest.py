"""Fixtures for several folders: a small bundle for texts, exported by the first example as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


class TextBundle(NamedTuple):
    """Where the first example left its bundle, and what it printed."""

    path: Path
    printed: str


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    output = tmp_path_factory.mktemp("example")
    return TextBundle(output / "bundle", run_example("01_train_and_export.py", output))


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder of tests/decoders.py as a bundle that no test may change."""
    from tests import decoders

    return decoders.export_to(tmp_path_factory.mktemp("decoder"))
