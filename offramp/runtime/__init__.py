"""What ships: opens a bundle and answers requests. Numpy and one backend; never torch, never onnx.

from offramp.runtime import Runner

with Runner.open("bundle") as runner:
    result = runner.run(runner.encode(["a warm and funny film"]))
"""

from offramp.runtime.backends import PlanWarning
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.fake import FakeEngine, fake_runner
from offramp.runtime.runner import Result, Runner
from offramp.runtime.tensorrt.options import TensorRtOptions

__all__ = ["Engine", "FakeEngine", "PlanWarning", "Result", "Runner", "SegmentOutput", "TensorRtOptions", "fake_runner"]
