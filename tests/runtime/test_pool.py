"""The pool on fake engines that wait for a signal: what runs with what, who is answered, who is refused and when."""

from __future__ import annotations

import concurrent.futures
import threading
from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import tiny
from pooling import (
    PATIENCE_S,
    POLICY,
    STAYS,
    exit_of,
    flat_costs,
    gated_runner,
    numbered_runner,
    numbers_of,
    occupy,
    request,
    rows_run,
)

from offramp.errors import BackendError, DeadlineError, InputError, OptionError, QueueFullError
from offramp.policy import Policy, Veto
from offramp.runtime import Admission, Answer, BatchCosts, FakeEngine, Pool, SegmentOutput
from offramp.runtime.batch import Leaving
from offramp.runtime.schedule import MIN_ROWS_SEEN


def wait_all(answers: list[Any]) -> None:
    for answer in answers:
        answer.result(PATIENCE_S)


def test_what_waits_runs_together() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=4) as pool:
        first = occupy(pool, gate)
        later = [pool.submit(request(n)) for n in range(6)]
        gate.let_go(3)
        assert [numbers_of(answer.result(PATIENCE_S)) for answer in later] == [[n] for n in range(6)]
        assert first.done()
    assert rows_run(runner, 0) == [1, 4, 2]


def test_survivors_of_different_batches_run_together_where_that_pays() -> None:
    runner = numbered_runner()
    with Pool(runner, max_batch=8, costs=flat_costs()) as pool:
        teach = [pool.submit(request(*range(8))) for _ in range(64)]  # half leave first, a quarter next
        wait_all(teach)
        assert pool.plans[1].regroup == (False, True, True)
        gate = gated_runner()[1]
        runner.engines = (gate, *runner.engines[1:])
        answers = [occupy(pool, gate, STAYS)]
        answers += [pool.submit(request(*range(n, n + 8))) for n in range(0, 32, 8)]
        before = len(rows_run(runner, 1))
        gate.let_go(5)
        assert [numbers_of(answer.result(PATIENCE_S)) for answer in answers[1:]] == [
            list(range(n, n + 8)) for n in range(0, 32, 8)
        ]
        assert 8 in rows_run(runner, 1)[before:]  # four rows each went on


def test_without_costs_or_where_there_is_nothing_to_gain_batches_run_to_completion() -> None:
    steep = replace(flat_costs(), ms=((1.0, 8.0),) * 3)
    for costs in (None, steep):
        runner = numbered_runner()
        with Pool(runner, max_batch=8, costs=costs) as pool:
            wait_all([pool.submit(request(*range(8))) for _ in range(64)])
            assert not any(pool.plans[1].regroup)
        assert set(rows_run(runner, 1)) <= ({4} if costs is None else {0, 1, 2, 3, 4})


def test_engines_whose_carry_does_not_last_are_neither_regrouped_nor_shared() -> None:
    runner = numbered_runner()
    for engine in runner.engines:
        engine.keeps_carries = False
    with Pool(runner, max_batch=8, costs=flat_costs()) as pool:
        wait_all([pool.submit(request(*range(8))) for _ in range(64)])
        assert pool.plans[1].gain > 1.2
        assert not any(pool.plans[1].regroup)
    with pytest.raises(OptionError, match="workers=2, expected 1"):
        Pool(runner, workers=2)


def test_no_rows_are_answered_at_once_and_many_are_split() -> None:
    runner = numbered_runner()
    with Pool(runner, max_batch=8) as pool:
        assert pool.submit(request()).result(0).outputs["logits"].shape == (0, 2)
        whole = pool.submit(request(*range(50))).result(PATIENCE_S)
    assert numbers_of(whole) == list(range(50))
    assert whole.exit_index.tolist() == [exit_of(n) for n in range(50)]
    assert max(rows_run(runner, 0)) == 8


def test_a_wrong_request_is_refused_and_nobody_else() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=8) as pool:
        for wrong in (
            {"y": np.zeros(1, np.float32)},
            {"x": np.zeros((1, 1), np.float32)},
            {"x": [1.0]},
            {"x": np.zeros(1)},
        ):
            with pytest.raises(InputError):
                pool.submit(wrong)
        occupy(pool, gate)
        good, bad = pool.submit(request(1)), pool.submit({"x": np.array([np.nan], np.float32)})
        gate.let_go(3)
        assert numbers_of(good.result(PATIENCE_S)) == [1]
        with pytest.raises(InputError, match="row 0 holds NaN"):
            bad.result(PATIENCE_S)
        alone = pool.submit({"x": np.array([np.inf], np.float32)})
        assert isinstance(alone.exception(PATIENCE_S), InputError)
        assert pool.num_rows == 0


def test_a_full_pool_refuses_at_once_and_takes_more_when_rows_have_left() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=8, admission=Admission(max_rows=3)) as pool:
        occupied = occupy(pool, gate)
        waiting = pool.submit(request(1, 3))
        with pytest.raises(QueueFullError, match="holds 3 rows and takes 3, got 1 more"):
            pool.submit(request(5))
        assert waiting.cancel()
        last = pool.submit(request(5))
        gate.let_go(2)
        assert numbers_of(last.result(PATIENCE_S)) == [5]
        assert numbers_of(occupied.result(PATIENCE_S)) == [STAYS]
    assert rows_run(runner, 0) == [1, 1]


def test_cancelled_rows_cost_nothing_more() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=8) as pool:
        first, second = occupy(pool, gate), pool.submit(request(8, 12))
        gate.let_go()
        gate.wait_begun()
        assert second.cancel()
        assert second.cancel()
        gate.let_go()
        assert numbers_of(first.result(PATIENCE_S)) == [STAYS]
        with pytest.raises(concurrent.futures.CancelledError):
            second.result(PATIENCE_S)
        assert not first.cancel()
    assert rows_run(runner, 0) == [1, 2]
    assert rows_run(runner, 1) == [1]


def test_rows_that_are_late_are_refused_between_segments_and_in_the_queue() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=8) as pool:
        running = pool.submit(request(STAYS), deadline_ms=5)
        gate.wait_begun()
        waiting, patient = pool.submit(request(1), deadline_ms=5), pool.submit(request(3), deadline_ms=1e6)
        threading.Event().wait(0.01)
        gate.let_go(2)
        for answer in (running, waiting):
            with pytest.raises(DeadlineError, match="deadline passed"):
                answer.result(PATIENCE_S)
        assert numbers_of(patient.result(PATIENCE_S)) == [3]
        assert pool.num_rows == 0
    assert rows_run(runner, 0) == [1, 1]
    assert rows_run(runner, 1) == []


def test_many_deadlines_are_not_kept_for_ever() -> None:
    with Pool(numbered_runner()) as pool:
        for _ in range(3000):
            pool.submit(request(1), deadline_ms=1e9).result(PATIENCE_S)
        assert len(pool._deadlines) < 1100


def test_a_failing_engine_fails_its_batch_only() -> None:
    runner, gate = gated_runner()

    class Failing(FakeEngine):
        def run(self, carry: Any, rows: Any, inverse_temperature: Any) -> SegmentOutput:
            if 66 in carry["x"]:
                raise BackendError("it broke")
            return super().run(carry, rows, inverse_temperature)

    broken = Failing(lambda inputs: np.stack([inputs["x"], inputs["x"] - 5], axis=1))
    runner.engines = (gate, broken, runner.engines[2])
    with Pool(runner, max_batch=2) as pool:
        occupy(pool, gate)
        pairs = [pool.submit(request(n)) for n in (66, 4, 64, 8)]
        gate.let_go(3)
        errors = [answer.exception(PATIENCE_S) for answer in pairs[:2]]
        assert all(isinstance(error, BackendError) and str(error) == "it broke" for error in errors)
        assert errors[0] is not errors[1]
        assert [numbers_of(answer.result(PATIENCE_S)) for answer in pairs[2:]] == [[64], [8]]


def test_a_request_finishes_under_the_policy_it_began_with() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=8) as pool:
        first = occupy(pool, gate)
        old = [pool.submit(request(n)) for n in (1, 4)]
        runner.policy = Policy.full_depth()
        new = [pool.submit(request(n)) for n in (1, 4)]
        gate.let_go(3)
        assert [answer.result(PATIENCE_S).exit_index.tolist() for answer in old] == [[0], [2]]
        assert [answer.result(PATIENCE_S).exit_index.tolist() for answer in new] == [[2], [2]]
        assert first.result(PATIENCE_S).exit_index.tolist() == [2]
    assert rows_run(runner, 0) == [1, 2, 2]


def test_sources_share_an_engine_call_and_keep_their_policies() -> None:
    runner, gate = gated_runner(
        replace(POLICY, sources={"slow": Policy.full_depth(), "rash": Policy(limits=(0.0, 0.0))})
    )
    with Pool(runner, max_batch=8) as pool:
        occupy(pool, gate)
        answers = [pool.submit(request(n), source) for n in (1, 4) for source in ("slow", "", "rash", "unknown")]
        gate.let_go(2)
        exits = [answer.result(PATIENCE_S).exit_index.tolist() for answer in answers]
    assert exits == [[2], [0], [0], [0], [2], [2], [0], [2]]
    assert rows_run(runner, 0) == [1, 8]
    assert rows_run(runner, 1) == [1, 4]


@pytest.mark.parametrize("numbers", [[1, 4, 3, 8, 12, 6], [4, 8, 12], [1, 3, 5]])  # some leave, nobody, all
def test_rows_of_two_policies_in_one_batch_stay_themselves(numbers: list[int]) -> None:
    runner, gate = gated_runner(replace(POLICY, sources={"alike": replace(POLICY)}))
    asked = [(n + more, source) for n in numbers for more, source in ((0, ""), (16, "alike"))]  # n + 16 leaves with n
    with Pool(runner, max_batch=12) as pool:
        occupy(pool, gate)
        answers = [pool.submit(request(n), source) for n, source in asked]
        gate.let_go(2)
        results = [answer.result(PATIENCE_S) for answer in answers]
    assert [numbers_of(result) for result in results] == [[n] for n, _ in asked]
    assert [result.exit_index.tolist() for result in results] == [[exit_of(n)] for n, _ in asked]


def test_halves_of_a_request_that_overtook_one_another_are_put_in_order() -> None:
    logits = np.arange(8, dtype=np.float32).reshape(4, 2)
    said = SegmentOutput(None, logits, np.arange(4), np.zeros((4, 3), np.float32))
    with Pool(numbered_runner()) as pool:
        answer = Answer(pool, 4, POLICY)
        Leaving(said, [answer] * 4, [2, 3, 0, 1], 0, "max_prob").add_parts()
    (part,) = answer.parts
    assert part.positions.tolist() == [0, 1, 2, 3]
    assert part.out.prediction.tolist() == [2, 3, 0, 1]
    np.testing.assert_array_equal(part.out.logits, logits[[2, 3, 0, 1]])


@pytest.mark.parametrize("veto", [Veto(mean=True), Veto(previous=True)])
@pytest.mark.parametrize("costs", [None, flat_costs()])
def test_what_a_policy_remembers_goes_with_the_rows(veto: Veto, costs: BatchCosts | None) -> None:
    runner = numbered_runner(replace(POLICY, veto=veto))
    requests = [request(*range(start, start + 3)) for start in range(150)]
    expected = [runner.run(each) for each in requests]
    with Pool(runner, max_batch=8, costs=costs) as pool:
        answers = [pool.submit(each) for each in requests]
        for answer, alone in zip(answers, expected, strict=True):
            tiny.assert_same(answer.result(PATIENCE_S), alone)
        assert any(pool.plans[1].regroup) == (costs is not None)


def test_rows_wait_for_company_as_long_as_they_are_asked_to() -> None:
    runner = numbered_runner()
    with Pool(runner, max_batch=2, max_wait_ms=1e7) as pool:
        one = pool.submit(request(1))
        assert not one.done()
        other = pool.submit(request(3))
        assert [numbers_of(answer.result(PATIENCE_S)) for answer in (one, other)] == [[1], [3]]
        assert rows_run(runner, 0) == [2]
        hurried = pool.submit(request(1), deadline_ms=1)
        assert isinstance(hurried.exception(PATIENCE_S), DeadlineError)
        last = pool.submit(request(5))
    assert numbers_of(last.result(0)) == [5]  # closing waits for nobody's company


def test_rows_wait_no_longer_than_they_are_asked_to() -> None:
    with Pool(numbered_runner(), max_batch=8, max_wait_ms=1.0) as pool:
        assert numbers_of(pool.submit(request(1)).result(PATIENCE_S)) == [1]


def test_the_survival_it_sees_is_the_runner_s(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = numbered_runner()
    with Pool(runner, max_batch=8) as pool:
        wait_all([pool.submit(request(*range(8))) for _ in range(MIN_ROWS_SEEN)])
        assert pool._epoch.survival.rates() == (0.5, 0.5)


def test_a_deadline_that_is_no_number_is_refused() -> None:
    with Pool(numbered_runner()) as pool, pytest.raises(OptionError, match="deadline_ms=nan"):
        pool.submit(request(1), deadline_ms=nan)
    assert pool.num_rows == 0


def test_options_are_checked() -> None:
    runner = numbered_runner()
    for options in ({"max_batch": 0}, {"workers": 0}, {"max_wait_ms": -1.0}, {"max_wait_ms": inf}, {"max_batch": 1.5}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Pool(runner, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="costs of 2 segments, the runner has 3"):
        Pool(runner, costs=flat_costs(num_segments=2))
    for admission in ({"max_rows": 0}, {"pad_to": 0}):
        with pytest.raises(OptionError, match=next(iter(admission))):
            Admission(**admission)
