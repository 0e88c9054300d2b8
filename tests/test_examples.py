"""The examples run as they are, in processes of their own; the third serves what the first exported."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, TextBundle, run_example


def test_train_and_export(text_bundle: TextBundle) -> None:
    printed = text_bundle.printed
    assert "chain equals whole graph bit for bit: True" in printed
    assert printed.count("at exit") == 2


def test_bring_your_own_model(tmp_path: Path) -> None:
    printed = run_example("02_bring_your_own_model.py", tmp_path / "bundle")
    accuracy = float(printed.split("accuracy:")[1].split()[0])
    assert accuracy > 0.9


def test_embed_in_a_service(text_bundle: TextBundle) -> None:
    spec = importlib.util.spec_from_file_location("service", EXAMPLES / "03_embed_in_a_service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.server_for(module.Service(text_bundle.path), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with urllib.request.urlopen(url, data=b"a lovely little film") as response:
            answer = json.load(response)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert answer["label"] in ("negative", "positive")
    assert answer["exit_index"] in (0, 1)


def test_pool(text_bundle: TextBundle) -> None:
    printed = run_example("04_pool.py", text_bundle.path)
    assert "answered in tasks: 32" in printed
    assert "answered in a thread:" in printed
    assert "tokens: batches of" in printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
