"""Nested phases as one fraction, and bars only where somebody looks at them."""

from offramp.export.build_progress import Phases, ignore_progress, progress_bars


def test_nested_phases_add_up():
    phases = Phases()
    phases.start("build", 2)
    assert phases.fraction == 0.0
    phases.start("optimize", 4)
    phases.complete("optimize", 0)
    assert phases.fraction == 0.125  # a quarter of the first half
    phases.complete("optimize", 3)
    phases.finish("optimize")
    phases.complete("build", 0)
    assert phases.fraction == 0.5
    phases.complete("build", 1)
    assert phases.fraction == 1.0


def test_the_fraction_never_falls_and_survives_phases_nobody_started():
    phases = Phases()
    phases.complete("stray", 0)
    assert phases.fraction == 1.0
    phases.finish("unknown")
    phases.start("late", 10)
    assert phases.fraction == 1.0


def test_no_bars_without_a_terminal(capsys):
    with progress_bars(True) as show:
        assert show is ignore_progress
    assert capsys.readouterr() == ("", "")


def test_bars_go_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress_bars(False) as show:
        assert show is ignore_progress
    with progress_bars(True) as show:
        show(0, 0.5, "Timing tactics")
        show(0, 1.0, "Serializing")
        show(1, 0.1, "Parsing")
    out, err = capsys.readouterr()
    assert out == ""
    assert "segment 0" in err
    assert "segment 1" in err
    assert "Serializing" in err
