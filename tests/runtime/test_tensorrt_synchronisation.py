"""Every synchronisation is needed: with any one of them taken out, the fake device finds a hazard.

The list is what the engine really calls, seen in a run of all its modes; a new one joins it by itself, and fails here
until some request shows what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from faked import Faked, log_of

from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.tensorrt.device import Event, Stream
from offramp.runtime.tensorrt.fake_device import FakeDevice, HazardError

SYNCHRONISATIONS = {  # what is called -> what goes wrong without it
    "wait answered": "the host reads answers that are still travelling",
    "record answered compute": "the same: the wait is for an older point",
    "record answered copies": "the same, with a stream of their own for the answers",
    "record computed compute": "answers are copied while the segment computes them",
    "hold copies computed": "the same",
    "wait staged": "the host overwrites rows that a speculative run has not fetched yet",
    "record staged compute": "the same",
    "finish": "after an interrupted request the host overwrites what the device still reads",
}


@dataclass
class Faults:
    """What goes wrong with the devices of one test."""

    removed: str = ""  # a synchronisation that is not done
    interrupted: int = 0  # the number of the wait that is interrupted; 0: none
    waits: int = field(default=0, init=False)


class FaultyDevice(FakeDevice):
    """A fake device on which one synchronisation does nothing, and one wait may be interrupted."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.faults = faults

    def record(self, event: Event, stream: Stream) -> None:
        if self.faults.removed != f"record {event.name} {stream.name}":
            super().record(event, stream)

    def hold(self, stream: Stream, event: Event) -> None:
        if self.faults.removed != f"hold {stream.name} {event.name}":
            super().hold(stream, event)

    def wait(self, event: Event) -> None:
        self.faults.waits += 1
        if self.faults.waits == self.faults.interrupted:
            raise KeyboardInterrupt
        if self.faults.removed != f"wait {event.name}":
            super().wait(event)

    def finish(self) -> None:
        if self.faults.removed != "finish":
            super().finish()


def exercise(bundle: Path, make_device: Callable[[], FakeDevice], *, speculate: bool, graphs: bool) -> list[str]:
    """Requests of many kinds, compared with ONNX Runtime; returns what the devices were asked."""
    faked = Faked(bundle, TensorRtOptions(graphs=graphs, speculate=speculate), make_device)
    runner = faked.runner(Policy())
    plain = Runner.open(bundle, "onnxruntime", threads=1)
    policies = [Policy.full_depth(), Policy.thresholds("max_prob", [0.6, 0.8]), Policy.thresholds("max_prob", [0, 0])]
    for num_rows in (3, 3, 3, 1, 8, 3):
        for policy in policies:
            runner.policy = plain.policy = policy
            inputs = tiny.request(tiny.sentences(num_rows))
            try:
                tiny.assert_same(runner.run(inputs), plain.run(inputs))
            except KeyboardInterrupt:
                continue
    runner.close()
    return log_of(faked.devices)


MODES = [{"speculate": speculate, "graphs": graphs} for speculate in (False, True) for graphs in (False, True)]


def test_the_list_is_what_the_engine_calls(bundle: Path) -> None:
    verbs = ("record", "hold", "wait", "finish")
    seen: set[str] = set()
    for mode in MODES:
        log = exercise(bundle, lambda: FaultyDevice(Faults()), **mode)
        seen |= {entry for entry in log if entry.split()[0] in verbs}
    assert seen == set(SYNCHRONISATIONS)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_interrupted_request_does_no_harm(bundle: Path, mode: dict[str, bool]) -> None:
    for number in range(1, 20):
        faults = Faults(interrupted=number)
        exercise(bundle, lambda faults=faults: FaultyDevice(faults), **mode)  # type: ignore[misc]
        assert faults.waits > number


@pytest.mark.parametrize("removed", SYNCHRONISATIONS)
def test_without_any_one_of_them_there_is_a_hazard(bundle: Path, removed: str) -> None:
    interrupted = 1 if removed == "finish" else 0  # it is only called after an error
    modes = set()
    for mode in MODES:
        try:
            exercise(bundle, lambda: FaultyDevice(Faults(removed, interrupted)), **mode)
        except HazardError:
            modes.add("speculate" if mode["speculate"] else "plain")
    only_plain, always = {"record answered compute"}, {"wait answered", "finish"}
    expected = {"plain"} if removed in only_plain else {"speculate", "plain"} if removed in always else {"speculate"}
    assert modes == expected, f"without {removed!r}, {SYNCHRONISATIONS[removed]}; it showed in {modes or 'no mode'}"
