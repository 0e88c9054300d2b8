"""Tells somebody of changes of state, in a thread of its own: who is told can neither stop nor delay an answer."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from offramp.runtime.monitor_states import FULL_DEPTH, RECOVERY, Change

_LOG = logging.getLogger(__name__)
_MOST_WAITING = 64  # changes; whoever is that far behind is not listening


class Sink:
    """Changes in their order, each told once; those who fail, or are too slow, are counted in `errors`."""

    def __init__(self, on_change: Callable[[Change], object]) -> None:
        self._on_change = on_change
        self._waiting: deque[Change] = deque()
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self.errors = 0

    def put(self, changes: list[Change]) -> None:
        """Tell of `changes` soon; returns at once. The thread lives as long as there is something to tell."""
        with self._lock:
            self._waiting.extend(changes)
            while len(self._waiting) > _MOST_WAITING:
                self._waiting.popleft()
                self.errors += 1
            if not self._waiting or not self._idle.is_set():
                return
            self._idle.clear()
        try:
            threading.Thread(target=self._tell, name="offramp-monitor", daemon=True).start()
        except RuntimeError:  # no more threads here, or the interpreter is going down; with the next change, then
            with self._lock:
                self.errors += 1
            self._idle.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything was told; whether it was."""
        return self._idle.wait(timeout_s)

    def _tell(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._idle.set()
                    return
                change = self._waiting.popleft()
            try:
                whose = f" of source {change.source!r}" if change.source else ""
                level = logging.WARNING if {change.before, change.after} & {FULL_DEPTH, RECOVERY} else logging.INFO
                _LOG.log(level, "monitor%s: %s -> %s: %s", whose, change.before, change.after, change.cause)
                self._on_change(change)
            except BaseException:  # sys.exit() ends a thread, and nobody would be told any more
                _LOG.exception("a callback of the monitor failed at %s", change)
                with self._lock:
                    self.errors += 1
