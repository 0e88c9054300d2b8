"""The trace of a decoder's bundle: its rows are token positions, so that calibrate sets thresholds per token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from offramp.commands.scoring import texts_to_score, windows
from offramp.errors import OptionError
from offramp.policy import Policy
from offramp.runtime.backends import ONNXRUNTIME
from offramp.runtime.record_texts import record_texts
from offramp.runtime.scorer import Scorer
from offramp.trace import save_trace

if TYPE_CHECKING:
    from offramp.commands.traces import TraceRequest

_USUAL_TEXTS = "rotten-tomatoes"


def precision_of(request: TraceRequest) -> str:
    """The graphs that a request for a decoder's trace means. Raises OptionError for another backend than its own."""
    if request.backend not in ("auto", ONNXRUNTIME):
        raise OptionError(f"--backend {request.backend}: a decoder runs on {ONNXRUNTIME}; leave it out")
    return "fp32" if request.precision == "auto" else request.precision


def record_decoder(bundle: Path, request: TraceRequest, path: Path) -> str:
    """Record what every exit says about every token of the texts of `request` in `path`; returns the trace's hash.

    Raises DataError, InputError, OptionError, BundleError, BackendError or StorageError.
    """
    precision = precision_of(request)
    texts = texts_to_score(request.data or _USUAL_TEXTS, request.limit)
    with Scorer.open(bundle, Policy.full_depth(), precision, request.threads) as scorer:
        trace = record_texts(scorer, windows(scorer, texts), precision)
    save_trace(path, trace)
    return trace.sha256
