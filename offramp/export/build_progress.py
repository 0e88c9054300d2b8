"""How far a build is: TensorRT's nested phases as one fraction, and bars on stderr. Imports no TensorRT."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

OnProgress = Callable[[float, str], None]  # fraction in [0, 1] and phase; called from the builder's threads
OnSegment = Callable[[int, float, str], None]  # the same for one segment, its index first


class Phases:
    """The phases under way, outermost first, as a fraction that never falls. For one thread at a time."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self._steps: dict[str, tuple[int, int]] = {}  # phase -> (steps done, steps)

    def start(self, phase: str, num_steps: int) -> None:
        """A phase begins, inside those under way."""
        self._advance(phase, 0, num_steps)

    def complete(self, phase: str, step: int) -> None:
        """Step `step` of a phase, counted from 0, is done."""
        self._advance(phase, step + 1, self._steps.get(phase, (0, step + 1))[1])

    def finish(self, phase: str) -> None:
        """A phase is over, whether or not all its steps were reported."""
        self._steps.pop(phase, None)

    def _advance(self, phase: str, done: int, num_steps: int) -> None:
        self._steps[phase] = done, num_steps
        fraction = 0.0
        for steps_done, steps in reversed(self._steps.values()):
            fraction = min((steps_done + fraction) / max(steps, 1), 1.0)
        self.fraction = max(self.fraction, fraction)


def progress_monitor(trt: Any, on_progress: OnProgress) -> Any:
    """An IProgressMonitor of the module `trt` that reports to `on_progress` and can cancel the build.

    Set its `is_cancelled` to cancel; what `on_progress` raises cancels too and is kept in `raised`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT calls it from its own threads; nothing may be raised into them."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.is_cancelled = threading.Event()
            self.raised: BaseException | None = None
            self._phases = Phases()
            self._lock = threading.Lock()

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase, num_steps)
                self._report(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                self._phases.complete(phase, step)
                self._report(phase)
            return not self.is_cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._phases.finish(phase)

        def _report(self, phase: str) -> None:
            try:
                on_progress(self._phases.fraction, phase)
            except BaseException as exc:  # kept for the thread that waits for the build
                self.raised = self.raised or exc
                self.is_cancelled.set()

    return Monitor()


def ignore_progress(segment: int, fraction: float, phase: str) -> None:
    """For who does not want to know."""


@contextlib.contextmanager
def progress_bars(is_wanted: bool) -> Iterator[OnSegment]:
    """One bar per segment on stderr, when it is a terminal and they are wanted; otherwise nothing at all."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (is_wanted and console.is_terminal):
        yield ignore_progress
        return
    bars: dict[int, TaskID] = {}
    columns = (
        "segment {task.fields[segment]}",
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:

        def show(segment: int, fraction: float, phase: str) -> None:
            if segment not in bars:
                bars[segment] = progress.add_task(phase, total=1.0, segment=segment)
            progress.update(bars[segment], completed=fraction, description=phase)

        yield show
