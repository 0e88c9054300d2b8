"""The README's Python runs as it stands, its commands exist with those options, and its tree is the repository."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from offramp.cli import main
from tests.conftest import TextBundle

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_runs(text_bundle: TextBundle, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        block = block.replace("[0.9, 0.85, 0.8]", "[0.9]")  # the bundle here has two exits
        exec(compile(block, "README.md", "exec"), {"bundle": text_bundle.path, "texts": ["fine", "dull"]})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_commands_exist_with_their_options() -> None:
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^.*?\b(offramp [a-z].*)$", README, re.MULTILINE)
    ]
    known = {name: command for name, command in main.commands.items()}
    used = [words for words in commands if words[1] in known]
    assert {words[1] for words in used} >= {"train", "export", "build-engine", "calibrate", "run", "bench"}
    for words in used:
        options = {
            flag for option in known[words[1]].params for flag in option.opts if isinstance(option, click.Option)
        }
        assert {word for word in words if word.startswith("-") and len(word) > 1} <= options


def test_run_prints_a_json_object_per_line(text_bundle: TextBundle) -> None:
    stdin = b"a moving, funny film\n\nwhat a waste\n" + b"\xff\xfe not UTF-8\n"
    result = CliRunner().invoke(main, ["run", str(text_bundle.path)], input=stdin)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 4
    assert all(line.keys() == {"prediction", "exit_index", "score", "reason", "label"} for line in lines)


def test_tree_names_every_file_of_the_package() -> None:
    listed = set(re.findall(r"^\s*([\w.]+\.py)\s", README, re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files", "offramp"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Path(line).name for line in tracked.stdout.splitlines() if line.endswith(".py")}
    assert names - {"__init__.py"} <= listed
