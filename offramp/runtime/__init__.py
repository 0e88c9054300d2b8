"""What ships: opens a bundle and answers requests. Numpy and one backend; never torch, never onnx.

from offramp.runtime import Runner

with Runner.open("bundle") as runner:
    result = runner.run(runner.encode(["a warm and funny film"]))
"""

from offramp.certificate import CertificateWarning
from offramp.runtime.admission import Admission
from offramp.runtime.answer import Answer
from offramp.runtime.backends import PlanWarning
from offramp.runtime.costs import BatchCosts, measure_batch_costs
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.fake import FakeEngine, fake_runner
from offramp.runtime.generator import GenerateOptions, Generator
from offramp.runtime.monitor import Monitor
from offramp.runtime.monitor_snapshot import Snapshot
from offramp.runtime.monitor_states import Baseline, Change, MonitorOptions
from offramp.runtime.pool import Pool
from offramp.runtime.runner import Result, Runner
from offramp.runtime.scorer import Scorer
from offramp.runtime.tensorrt.options import TensorRtOptions

__all__ = [
    "Admission",
    "Answer",
    "Baseline",
    "BatchCosts",
    "CertificateWarning",
    "Change",
    "Engine",
    "FakeEngine",
    "GenerateOptions",
    "Generator",
    "Monitor",
    "MonitorOptions",
    "PlanWarning",
    "Pool",
    "Result",
    "Runner",
    "Scorer",
    "SegmentOutput",
    "Snapshot",
    "TensorRtOptions",
    "fake_runner",
    "measure_batch_costs",
]
