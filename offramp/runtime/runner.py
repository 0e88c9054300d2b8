"""The runner: opens a bundle and answers requests, each row at the first exit whose policy lets it leave.

It schedules segments; what executes them is an Engine, who leaves is the Policy's decision.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, Manifest, load_manifest, read_certificate, read_file, read_policy
from offramp.certificate import Certificate, CertificateWarning
from offramp.errors import BundleError, CertificateError, OptionError
from offramp.policy import FINAL, Policy, score_values
from offramp.runtime.backends import EngineOptions, open_engines
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.inputs import checked_inputs
from offramp.runtime.monitor import Monitor
from offramp.runtime.monitor_watch import Watch, WatchedPolicy
from offramp.runtime.record import RecordOptions, Rows, record_trace, truth_from_labels
from offramp.runtime.tensorrt.options import TensorRtOptions
from offramp.runtime.text import TextEncoder
from offramp.runtime.trimming import trimming_from_manifest
from offramp.trace import Trace

_USUAL_ROWS = 1024  # positions kept at hand; more are made when they are asked for


class Result(NamedTuple):
    """The answers to one request of N rows, in its order."""

    outputs: dict[str, NDArray[np.float32]]  # "logits": (N, C), of the exit where the row left
    prediction: NDArray[np.int64]  # (N,)
    exit_index: NDArray[np.int64]  # (N,) in 0 … E-1
    score: NDArray[np.float32]  # (N,) in [0, 1]: the policy's score at that exit; NaN: it has no learned one
    reason: list[str]  # N: what released the row; policy.FINAL when nothing did before the final exit


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy and what follows from it, swapped as one."""

    policy: Policy  # for requests without a source, or from one it does not name
    sources: Mapping[str, Policy]  # the others'
    inverse_temperatures: tuple[np.float32, ...]  # E

    def policy_of(self, source: str) -> Policy:
        """The policy for a request from `source`."""
        return self.sources.get(source, self.policy) if source else self.policy


class Runner:
    """A model cut into segments, ready to answer, from as many threads as one likes."""

    def __init__(
        self,
        engines: Sequence[Engine],
        manifest: Manifest,
        policy: Policy,
        *,
        backend: str = "fake",
        precision: str = "fp32",
        monitor: Monitor | None = None,
    ) -> None:
        """A runner over `engines`, one per segment of `manifest`; `close` closes them. `monitor` watches its requests.

        Raises OptionError when their numbers differ or the policy, or the monitor, is for another model.
        """
        if len(engines) != len(manifest.segments):
            raise OptionError(
                f"runner: got {len(engines)} engines, the manifest has {len(manifest.segments)} segments; "
                f"expected one engine per segment"
            )
        if len({spec.num_classes for spec in manifest.exits}) != 1:
            raise BundleError(
                f"bundle {manifest.name!r}: its exits have {[spec.num_classes for spec in manifest.exits]} "
                f"classes; expected the same number everywhere; export the model with like exits"
            )
        self.engines = tuple(engines)
        self.manifest = manifest
        self.backend = backend
        self.precision = precision
        self.files: tuple[str, ...] = ()  # E: SHA-256 of the graph or plan that each segment runs; fakes have none
        self._certificate: Certificate | None = None  # the bundle's, whether it holds or not
        self._text: TextEncoder | None = None
        self._is_closed = False
        limits = manifest.dimensions.get(ROWS)
        self._max_rows = limits.max if limits else sys.maxsize
        self._positions = np.arange(min(self._max_rows, _USUAL_ROWS))
        self._trimming = trimming_from_manifest(manifest, precision)
        self._monitor: Monitor | None = None
        self.policy = policy
        self.monitor = monitor

    @classmethod
    def open(  # noqa: PLR0913  (all but the bundle by name)
        cls,
        bundle: str | Path,
        backend: str = "auto",
        policy: Policy | None = None,
        threads: int = 0,
        precision: str = "auto",
        tensorrt: TensorRtOptions = TensorRtOptions(),  # noqa: B008  (frozen)
        *,
        require_certificate: bool = False,
        monitor: Monitor | None = None,
    ) -> Runner:
        """A runner over the bundle in directory `bundle`; `policy=None` takes the bundle's own.

        `backend` is "auto" or one of backends.BACKENDS; `threads=0` leaves their number to the backend; precision
        "auto" is FP32 on ONNX Runtime, on TensorRT FP16 where there are such plans.

        A certificate of the bundle that does not hold for these engines under the bundle's own policy is a
        CertificateWarning. With `require_certificate` it is an error, and so are no certificate and a policy of your
        own that it is not for. `monitor` watches all requests. Raises OptionError, BundleError (CorruptError,
        VersionError, CertificateError) or BackendError.
        """
        path = Path(bundle)
        manifest = load_manifest(path)
        if manifest.decoder:
            raise BundleError(f"bundle {manifest.name!r} is a decoder: open it with `Generator.open`")
        chosen = Policy.from_json(read_policy(path, manifest)) if policy is None else policy
        chosen.check_model(manifest)
        tokenizer = read_file(path, manifest.text.tokenizer) if manifest.text else b""
        opened = open_engines(path, manifest, EngineOptions(backend, precision, threads, tensorrt))
        runner = cls(opened.engines, opened.manifest, chosen, backend=opened.backend, precision=opened.precision)
        runner.files = opened.files
        try:
            if manifest.text:
                runner._text = TextEncoder(tokenizer, manifest.text, opened.manifest)
            runner._certify(path, require_certificate, is_own_policy=policy is None)
            runner.monitor = monitor
        except BaseException:
            runner.close()
            raise
        return runner

    @property
    def policy(self) -> Policy:
        """The policy of the next request; a request under way finishes under the one it began with."""
        return self.setting.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        num_exits = len(self.manifest.exits)
        policy.check_model(self.manifest)
        sources = {source: policy.for_source(source) for source in policy.sources}
        inverse = tuple(policy.inverse_temperatures(num_exits))
        self.setting = Setting(policy, sources, inverse)  # one assignment: a request sees the old one or the new one
        if self._monitor is not None:
            self._monitor.policy_changed(policy)

    @property
    def monitor(self) -> Monitor | None:
        """What watches the requests that begin from now on; None: nothing does, and nothing is spent on it."""
        return self._monitor

    @monitor.setter
    def monitor(self, monitor: Monitor | None) -> None:
        if monitor is not None:
            unlearned = [k for k, spec in enumerate(self.manifest.exits) if not spec.learned]
            monitor.attach(len(self.manifest.exits), unlearned)
            monitor.policy_changed(self.policy)
        self._monitor = monitor

    @property
    def certificate(self) -> Certificate | None:
        """The bundle's certificate, where it holds for these engines under the policy in force."""
        certificate = self._certificate
        return None if certificate is None or self._obstacle(certificate) else certificate

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The inputs for `texts`, padded to the longest. Raises InputError, BackendError or BundleError."""
        if self._text is None:
            raise BundleError(
                f"bundle {self.manifest.name!r} has no tokenizer; pass arrays to `run`: "
                f"{', '.join(spec.name for spec in self.manifest.inputs)}"
            )
        return self._text.encode(texts)

    def run(self, inputs: Mapping[str, NDArray[Any]], source: str = "") -> Result:
        """Answer N >= 0 rows; any N, split where the bundle's maximum asks for it. Raises InputError.

        `source` says where the request comes from, for a policy that treats sources differently.
        """
        self._check_open()
        arrays, num_rows = checked_inputs(inputs, self.manifest)
        setting = self.setting
        monitor = self._monitor
        if monitor is None:
            return self._answer(arrays, num_rows, setting, setting.policy_of(source), None)
        watch = monitor.begin(source, num_rows, setting)
        try:
            result = self._answer(arrays, num_rows, setting, watch.policy, watch)
        except BaseException:
            monitor.forget(watch)
            raise
        monitor.observe(watch, result)
        return result

    def record(
        self,
        batches: Iterable[Mapping[str, NDArray[Any]]],
        labels: Sequence[float] | NDArray[Any] = (),
        temperatures: Sequence[float] = (),
        *,
        progress: bool = False,
    ) -> Trace:
        """What every exit says about every row of `batches`, and what each segment costs here.

        `labels` has one entry per row, or none: its class, or its value if the model is a regression; `temperatures`
        one per exit, or none for 1. The policy plays no part. Raises InputError, OptionError or DataError.
        """
        self._check_open()
        rows = [Rows(batch) for batch in batches] if isinstance(batches, Sequence) else map(Rows, batches)
        trace = record_trace(self, rows, RecordOptions(tuple(temperatures), progress=progress))
        if not len(labels):
            return trace
        truth = truth_from_labels(np.asarray(labels), len(trace.labels), trace.is_regression)
        return replace(trace, **truth._asdict())

    def close(self) -> None:
        """Close the engines; the runner cannot answer afterwards. Closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            for engine in self.engines:
                engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise OptionError("runner: it was closed; open it again with `Runner.open(bundle)`")

    def _certify(self, bundle: Path, is_required: bool, is_own_policy: bool) -> None:
        """Take over the bundle's certificate; warn or raise where it does not hold, as `open` says."""
        content, problem = read_certificate(bundle), "it has no certificate"
        if content:
            try:
                self._certificate = Certificate.from_json(content)
                problem = self._obstacle(self._certificate)
            except CertificateError as exc:
                problem = str(exc)
            if not problem:
                return
            problem = f"its certificate does not hold here: {problem}"
        message = f"opening {bundle}: {problem}; run `offramp calibrate {bundle} --max-risk 0.01`"
        if is_required:
            raise CertificateError(message)
        if content and is_own_policy:
            warnings.warn(message, CertificateWarning, stacklevel=3)

    def _obstacle(self, certificate: Certificate) -> str:
        return certificate.obstacle(self.files, self.backend, self.precision, self.policy.sha256)

    def _first(self, count: int) -> NDArray[np.int64]:
        """Positions 0 … count - 1; not to be written to."""
        return self._positions[:count] if count <= len(self._positions) else np.arange(count)

    def _answer(
        self,
        arrays: dict[str, NDArray[Any]],
        num_rows: int,
        setting: Setting,
        policy: Policy,
        watch: Watch | None,
    ) -> Result:
        """Answer the N rows of `arrays`, split where the bundle's maximum asks for it."""
        parts: list[Part] = []
        for start in range(0, num_rows, self._max_rows):
            live, chunk = self._first(num_rows), arrays
            if num_rows > self._max_rows:
                live = np.arange(start, min(start + self._max_rows, num_rows))
                chunk = {name: array[start : start + len(live)] for name, array in arrays.items()}
            rule = policy if watch is None or not watch.is_holding else WatchedPolicy(watch, live)
            self._run_chunk(chunk, live, rule, setting.inverse_temperatures, parts)
        if watch is not None:
            for part in parts:
                if part.out.retention is not None:
                    watch.retention += part.out.retention.tolist()
        return result_from_parts(parts, num_rows, self.manifest.exits[0].num_classes, policy.score)

    def _run_chunk(
        self,
        inputs: dict[str, NDArray[Any]],
        live: NDArray[np.int64],
        policy: Policy | WatchedPolicy,
        inverse_temperatures: tuple[np.float32, ...],
        parts: list[Part],
    ) -> None:
        """Answer the rows `live` (S,) of the request, whose inputs are `inputs`; adds `parts` that leave together.

        What ends up cold in the caches between two segments costs ten times its warm price, so a segment that
        nobody leaves, or that everybody leaves, touches no array that it need not.
        """
        final = len(self.engines) - 1
        carry: Any = inputs
        state = None
        rows = self._first(len(live))  # (S,) positions in the previous segment's output
        padding = self._trimming.padding_of(inputs) if self._trimming and len(live) > 1 else None
        for k, engine in enumerate(self.engines):
            if padding:
                carry = padding.cut(engine, carry, rows, is_first=k == 0)
            out = engine.run(carry, rows, inverse_temperatures[k])
            carry = out.carry
            if k == final:
                parts.append(Part(live, out, k, FINAL))
                return
            leaves, reason, state = policy.decide(k, out, state)
            left = leaves.tolist()
            if False not in left:
                parts.append(Part(live, out, k, reason))
                return
            if True in left:
                parts.append(Part(live[leaves], out.rows(leaves), k, reason))
                rows = (~leaves).nonzero()[0]
                live = live[rows]
                state = state.rows(rows) if state else None
            else:
                rows = self._first(len(live))


class Part(NamedTuple):
    """Rows that left together."""

    positions: NDArray[np.int64]  # (L,) in the request
    out: SegmentOutput  # of these L rows
    exit_index: int
    reason: str


def result_from_parts(parts: Sequence[Part], num_rows: int, num_classes: int, score: str) -> Result:
    """The answers of all parts in the order of the request."""
    if len(parts) == 1:
        _, out, exit_index, reason = parts[0]
        return Result(
            {"logits": out.logits},
            out.prediction,
            np.array([exit_index] * num_rows),
            score_values(score, out),
            [reason] * num_rows,
        )
    result = Result(
        {"logits": np.empty((num_rows, num_classes), np.float32)},
        np.empty(num_rows, np.int64),
        np.empty(num_rows, np.int64),
        np.empty(num_rows, np.float32),
        [""] * num_rows,
    )
    for positions, out, exit_index, reason in parts:
        result.outputs["logits"][positions] = out.logits
        result.prediction[positions] = out.prediction
        result.exit_index[positions] = exit_index
        result.score[positions] = score_values(score, out)
        for position in positions.tolist():
            result.reason[position] = reason
    return result
