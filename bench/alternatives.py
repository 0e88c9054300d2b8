"""Everything that a user could run instead of offramp's runner, opened on the same weights, and a check of each.

Which alternative decides how is said in `Alternative.rule`. Nothing is timed here: `check` is to be called first, and
it refuses an alternative whose predictions or exits are not those of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from eager import Answer, Uncut, compiled, leave_together, row_by_row, uncut
from if_graph import EXIT_INDEX, LOGITS, if_graph
from onnx import ModelProto
from onnxruntime import InferenceSession
from subject import Inputs, Subject

from offramp.bundle import SCORES, load_manifest, read_policy
from offramp.commands.uncut import load_reference, uncut_model
from offramp.errors import OfframpError
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.trace import Trace
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.replay import replay, scores_at

# Scores in torch against those of the engines; 1e-6 was seen, and near a threshold such a row may leave elsewhere.
SCORE_ATOL = 1e-4

FINAL_EXIT, PER_ROW, TOGETHER = "all rows take the final exit", "every row leaves alone", "the batch leaves together"
UNCUT, TUNED = "uncut", "uncut, offramp's session options"
OFFRAMP, FULL_DEPTH, INT8 = "offramp", "offramp, full depth", "offramp INT8"
IF_GRAPH, EAGER_ROWS = "one graph with Ifs", "PyTorch eager, row by row"
TRAINED_ALONE = "static, trained alone"


@dataclass(frozen=True)
class Alternative:
    """One way to answer; `batches` says for which sizes of request it makes sense."""

    name: str
    rule: str
    answer: Answer
    alone: bool = True  # requests of one row
    batched: bool = True  # requests of more
    exits: bool = True  # whether exit_index means an exit of the subject's model


@dataclass(frozen=True)
class Opened:
    """The alternatives that opened here, and why the others did not."""

    alternatives: tuple[Alternative, ...]
    missing: dict[str, str]  # name -> reason


def plain_policy(subject: Subject, validation: Trace) -> tuple[Policy, str]:
    """The policy under which all are compared, and where it is from.

    The bundle's own where it has thresholds on a score of the segment contract and nothing else: a graph of Ifs and
    the eager loop know no more.
    """
    own = Policy.from_json(read_policy(subject.bundle, subject.manifest))
    if own.limits and own.score in SCORES and own == Policy.thresholds(own.score, own.limits, own.temperatures):
        return own, "the bundle's"
    drop = subject.max_drops[len(subject.max_drops) // 2]
    return calibrate(validation, CalibrateOptions(max_drop=drop)).policy, f"max_prob, a drop of {drop} on validation"


@contextmanager
def open_alternatives(subject: Subject, policy: Policy, threads: int, compiles: bool) -> Iterator[Opened]:
    """All alternatives with `threads` threads each; torch's number of threads is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            found = [*_in_onnxruntime(subject, policy, threads), *_in_torch(subject, policy)]
            missing: dict[str, str] = {}
            optional = [(TRAINED_ALONE, lambda: _trained_alone(subject, threads))]
            if compiles:
                optional.append(("torch.compile, uncut", lambda: _compiled(subject)))
            optional += [
                (FULL_DEPTH, lambda: _runner(stack, subject, FULL_DEPTH, Policy.full_depth(), threads)),
                (OFFRAMP, lambda: _runner(stack, subject, OFFRAMP, policy, threads)),
                (INT8, lambda: _runner(stack, subject, INT8, policy, threads, "int8")),
            ]
            for name, make in optional:
                try:
                    found.append(make())
                except (OfframpError, FileNotFoundError, RuntimeError) as exc:
                    missing[name] = f"did not run: {str(exc).splitlines()[0]}"
            yield Opened(tuple(found), missing)
    finally:
        torch.set_num_threads(before)


def _in_onnxruntime(subject: Subject, policy: Policy, threads: int) -> list[Alternative]:
    """The uncut graph, that graph with Ifs, and that graph cut off at each exit before the final one."""
    manifest = subject.manifest
    whole = load_reference(subject.bundle, manifest)
    exits = [spec.name for spec in manifest.exits]
    uncut_content = uncut_model(whole, exits[-1]).SerializeToString()
    tuned = open_session(uncut_content, threads, "the uncut model")
    found = [
        uncut_alternative(subject, threads),
        Alternative(TUNED, FINAL_EXIT, _answer_of(tuned, len(exits) - 1)),
    ]
    deciding = if_graph(whole, exits, manifest.exits[0].num_classes, policy)
    session = open_session(deciding.SerializeToString(), threads, "the graph with Ifs", left_out=())
    outputs = [value.name for value in deciding.graph.output]
    assert outputs == [f"{LOGITS}_0", f"{EXIT_INDEX}_0"]

    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        logits, exit_index = session.run(outputs, inputs)
        return logits.argmax(1), np.full(len(logits), exit_index)

    found.append(Alternative(IF_GRAPH, PER_ROW, answer, batched=False))
    found.append(Alternative(f"{IF_GRAPH}, batch leaves together", TOGETHER, answer, alone=False))
    for k, name in enumerate(exits[:-1]):
        found.append(Alternative(f"cut after exit {k}", FINAL_EXIT, _session_answer(whole, name, threads, k)))
    return found


def uncut_alternative(subject: Subject, threads: int) -> Alternative:
    """The whole model with its final exit only, in one session with all of ONNX Runtime's optimisations."""
    manifest = subject.manifest
    whole, final = load_reference(subject.bundle, manifest), len(manifest.exits) - 1
    return Alternative(UNCUT, FINAL_EXIT, _session_answer(whole, manifest.exits[-1].name, threads, final))


def _session_answer(whole: ModelProto, exit_name: str, threads: int, exit_index: int) -> Answer:
    model = uncut_model(whole, exit_name)
    session = open_session(model.SerializeToString(), threads, f"the graph up to {exit_name}", left_out=())
    return _answer_of(session, exit_index)


def _answer_of(session: InferenceSession, exit_index: int) -> Answer:
    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        (logits,) = session.run(None, inputs)
        return logits.argmax(1), np.full(len(logits), exit_index)

    return answer


def _in_torch(subject: Subject, policy: Policy) -> list[Alternative]:
    final = len(subject.model.config.exits) - 1
    return [
        Alternative("PyTorch eager, uncut", FINAL_EXIT, uncut(Uncut(subject.model), final)),
        Alternative(EAGER_ROWS, PER_ROW, row_by_row(subject.model, policy)),
        Alternative(
            "PyTorch eager, batch leaves together", TOGETHER, leave_together(subject.model, policy), alone=False
        ),
    ]


def _compiled(subject: Subject) -> Alternative:
    samples = [inputs for rows in (1, 8, 32) for inputs in subject.requests(rows)[:4]]
    return Alternative("torch.compile, uncut", FINAL_EXIT, compiled(subject.model, samples))


def _trained_alone(subject: Subject, threads: int) -> Alternative:
    if subject.static_bundle is None:
        raise FileNotFoundError("no bundle of a static model")
    manifest = load_manifest(subject.static_bundle)
    whole = load_reference(subject.static_bundle, manifest)
    answer = _session_answer(whole, manifest.exits[-1].name, threads, 0)
    return Alternative(TRAINED_ALONE, FINAL_EXIT, answer, exits=False)


def _runner(
    stack: ExitStack, subject: Subject, name: str, policy: Policy, threads: int, precision: str = "fp32"
) -> Alternative:
    runner = stack.enter_context(Runner.open(subject.bundle, "onnxruntime", policy, threads, precision))
    return Alternative(name, PER_ROW if policy.limits else FINAL_EXIT, runner_answer(runner))


def runner_answer(runner: Runner) -> Answer:
    """Predictions and exits of a runner under its policy."""

    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        result = runner.run(inputs)
        return result.prediction, result.exit_index

    return answer


def check(
    alternative: Alternative, policy: Policy, trace: Trace, requests: Sequence[Inputs], progress: Callable[[str], None]
) -> float:
    """Answer all `requests` and return the accuracy; exits unless every row is answered as the policy says.

    `trace` is what the exits say about the rows of `requests`. A row may differ where a score is within SCORE_ATOL of
    its threshold, or its two best classes are as near. An INT8 or another model has its own answers, and is only
    measured.
    """
    answers = [alternative.answer(inputs) for inputs in requests]
    prediction = np.concatenate([answer[0] for answer in answers])
    exit_index = np.concatenate([answer[1] for answer in answers])
    accuracy = float((prediction == trace.labels).mean())
    if alternative.name == INT8 or not alternative.exits:
        return accuracy
    if alternative.rule == FINAL_EXIT:
        expected = exit_index  # a static model says itself where it ends; its predictions are judged
        near = np.zeros(len(expected), np.bool_)
    else:
        sizes = [len(answer[0]) for answer in answers]
        expected, near = expected_exits(policy, trace, sizes if alternative.rule == TOGETHER else [])
    near |= trace.scores[np.arange(len(near)), expected, SCORES.index("margin")] < SCORE_ATOL  # two classes alike
    right = (exit_index == expected) & (prediction == trace.predictions[np.arange(len(expected)), expected])
    if wrong := np.flatnonzero(~right & ~near).tolist():
        raise SystemExit(
            f"{alternative.name}: {len(wrong)} of {len(right)} rows are not answered as the policy says, first row "
            f"{wrong[0]}: exit {exit_index[wrong[0]]}, expected {expected[wrong[0]]}; nothing was timed"
        )
    if num_near := int((~right & near).sum()):
        progress(f"{alternative.name}: {num_near} rows with a score on a threshold leave elsewhere")
    return accuracy


def expected_exits(policy: Policy, trace: Trace, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where every row leaves (N,), and which rows have a score on a threshold (N,).

    With `sizes`, requests of so many rows leave together, as soon as all of their rows are sure.
    """
    scores = scores_at(trace, policy.inverse_temperatures(trace.num_exits))[:, :, SCORES.index(policy.score)]
    limits = np.array([np.nan if limit is None else limit for limit in (*policy.limits, None)])
    with np.errstate(invalid="ignore"):
        near = (np.abs(scores - limits) < SCORE_ATOL).any(axis=1)
        sure = scores <= limits if policy.score == "entropy" else scores >= limits.astype(np.float32)  # (N, E)
    if not sizes:
        return replay(policy, trace).exit_index, near
    sure[:, -1] = True
    expected = np.empty(len(sure), np.int64)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = slice(start, start + size)
        expected[rows] = sure[rows].all(axis=0).argmax()
        near[rows] = near[rows].any()
    return expected, near
