"""`offramp run --monitor` and `offramp monitor`: a snapshot per process, and all of them together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from offramp.bundle import CERTIFICATE
from offramp.certificate import Certificate
from offramp.cli import main
from offramp.commands.monitoring import load_snapshots
from offramp.runtime import Runner, Snapshot
from tests.conftest import TextBundle

TEXTS = b"fine\ndull\na warm and funny film\n"


def invoke(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def certified(text_bundle: TextBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a certificate that holds here."""
    path = tmp_path_factory.mktemp("certified") / "bundle"
    shutil.copytree(text_bundle.path, path)
    with Runner.open(path) as runner:
        certificate = Certificate(
            "consistency", 0.01, 0.95, "by hand", 400, 0, 0.02, 0.008, (200, 200), 1.5, runner.backend,
            runner.precision, runner.files, runner.policy.sha256, "t" * 64,
        )  # fmt: skip
    (path / CERTIFICATE).write_text(certificate.to_json())
    return path


def test_snapshots_of_two_runs_add_up(certified: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        result = invoke("run", certified, "--monitor", path, stdin=TEXTS)
        assert result.exit_code == 0, result.output
        assert len(result.stdout.splitlines()) == 3
        assert result.stderr == ""
    single = Snapshot.from_json(paths[0].read_bytes())
    assert single.total.rows == 3
    assert single.streams[""].state == "normal"
    assert single.streams[""].is_certified

    shown = invoke("monitor", *paths)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("6 rows of 2 processes")
    assert "monitor: NORMAL, 0 trips" in shown.stdout
    assert Snapshot.from_json(invoke("monitor", *paths, "--json").stdout) == load_snapshots(paths)
    families = text_string_to_metric_families(invoke("monitor", *paths, "--prometheus").stdout)
    totals = {
        sample.name: sample.value for family in families for sample in family.samples if "reason" in sample.labels
    }
    assert sum(totals.values()) > 0


def test_without_a_certificate_it_counts_and_says_so(text_bundle: TextBundle, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    result = invoke("run", text_bundle.path, "--monitor", path, stdin=TEXTS)
    assert result.exit_code == 0, result.output
    assert "no certificate holds" in result.stderr
    assert json.loads(path.read_text())["streams"] == {}
    assert invoke("monitor", path).stdout.startswith("3 rows of 1 processes")


def test_a_snapshot_is_kept_at_every_change_of_state(certified: Path, tmp_path: Path) -> None:
    from offramp.commands.monitoring import monitored

    path = tmp_path / "snapshot.json"
    with Runner.open(certified) as runner, monitored(runner, path, pytest.fail) as monitor:
        assert not path.exists()
        stream = monitor._streams[""]
        for _ in range(2000):
            stream.update([0], [(0, True)])
            if stream.forces_full_depth:
                break
        monitor._tell()
        assert monitor.wait_told(30)
        assert Snapshot.from_json(path.read_bytes()).streams[""].state == "full depth"
        result = runner.run(runner.encode(["fine"]))
        assert result.exit_index.tolist() == [1]
    assert Snapshot.from_json(path.read_bytes()).total.rows == 1
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    missing = invoke("monitor", tmp_path / "none.json")
    assert missing.exit_code == 2
    assert "offramp run BUNDLE --monitor" in missing.stderr
    (tmp_path / "bad.json").write_text("{}")
    bad = invoke("monitor", tmp_path / "bad.json")
    assert bad.exit_code == 2
    assert "bad.json" in bad.stderr
    assert invoke("monitor").exit_code == 2
