"""earlyon 0.3 (PyPI) against offramp on a model that both can take: a CNN of four blocks on handwritten digits.

Physics: both run the same layers in the same order and decide at two exits. earlyon's wrapper decides in a forward
hook of eager PyTorch, one .item() an exit, and stops the backbone with an exception; its staged runtime, for an
nn.Sequential only, calls one module per stage instead. offramp runs one optimised graph per segment. On a batch earlyon
leaves when every row is sure, offramp lets each row go.

Measured: trained by earlyon's own joint trainer; the same weights are exported. Each tool calibrates on the same rows
with the same allowed drop; `offramp, earlyon's thresholds` takes the same decisions as earlyon, which is checked before
anything is timed. One row a request and 32, interleaved, one thread and OMP_WAIT_POLICY=PASSIVE. Digits are
scikit-learn's 1,797 images of 8x8, each pixel as a square of 4x4.

Needs `pip install 'earlyon==0.3.*' scikit-learn`, and says so where they are missing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import argparse
import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from timed import progress, time_requests
from torch import Tensor, nn

from offramp.commands.uncut import load_reference, uncut_model
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.tuning.calibrate import CalibrateOptions, calibrate

NEEDED = ("earlyon", "sklearn")
MAX_DROP = 0.01
THREADS = 1
SIZES = {"train": 797, "validation": 400, "test": 600}
INPUT = "pixels"
EXIT_LAYERS = ["1", "2"]  # blocks of the Sequential below
WIDTHS = (32, 64, 128, 256)
EPOCHS, LEARNING_RATE = 15, 0.05  # with earlyon's own rate of 0.01 no exit was sure after 12 epochs

Rows = tuple[np.ndarray, np.ndarray]  # images (N, 1, 32, 32) float32, labels (N,) int64


class AllExits(nn.Module):
    """The stages that earlyon's splitter made, as offramp wants a model: the logits of all exits in order."""

    def __init__(self, stages: Any) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        logits, features = [], pixels
        for stage in self.stages:
            features, said = stage(features)
            logits.append(said)
        return tuple(logits)


@dataclass(frozen=True)
class Peer:
    """earlyon's two runtimes on one trained and calibrated model."""

    wrapper: Any
    staged: Any
    policy: Policy  # its thresholds, in offramp's words


def make_backbone() -> nn.Sequential:
    """Four blocks of two convolutions, and a linear classifier: 1.2 million weights, 52 million products a row."""
    blocks: list[nn.Module] = []
    before = 1
    for position, width in enumerate(WIDTHS):
        layers = [nn.MaxPool2d(2)] if position else []
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)))


def load_digits() -> dict[str, Rows]:
    """Train, validation and test, always the same rows."""
    from sklearn.datasets import load_digits as digits

    found = digits()
    images = np.kron(found.images.astype(np.float32) / 16, np.ones((4, 4), np.float32))[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    ends = np.cumsum(list(SIZES.values()))
    parts = np.split(order[: ends[-1]], ends[:-1])
    return {name: (images[rows], found.target[rows].astype(np.int64)) for name, rows in zip(SIZES, parts, strict=True)}


def train_peer(data: dict[str, Rows], epochs: int) -> Peer:
    """earlyon from the backbone to calibrated thresholds, as its README says."""
    from earlyon.core.thresholds import calibrate_thresholds
    from earlyon.models import custom_ee
    from earlyon.staged import staged_model
    from earlyon.training import joint_train_backbone_and_exits
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    sets = {name: TensorDataset(*map(torch.from_numpy, rows)) for name, rows in data.items()}
    wrapper = custom_ee(make_backbone(), EXIT_LAYERS, num_classes=10, input_shape=(1, 1, 32, 32))
    loader = DataLoader(sets["train"], batch_size=32, shuffle=True)
    joint_train_backbone_and_exits(
        wrapper,
        loader,
        epochs=epochs,
        lr=LEARNING_RATE,
        on_epoch_end=lambda log: progress(f"epoch {log.epoch}: loss {log.loss:.3f}"),
    )
    wrapper.eval()
    calibrate_thresholds(wrapper, DataLoader(sets["validation"], batch_size=64), target_accuracy_drop=MAX_DROP)
    config = wrapper.config
    limits = [
        limit if enabled else None
        for limit, enabled in zip(config.confidence_thresholds, config.enabled_exits, strict=True)
    ]
    return Peer(wrapper, staged_model(wrapper), Policy.thresholds("max_prob", limits))


def export_peer(peer: Peer, images: np.ndarray, bundle: Path) -> None:
    """The peer's weights as a bundle in FP32."""
    example = Example({INPUT: torch.from_numpy(images[:16])})
    source = source_from_model("digits", AllExits(peer.staged.stages).eval(), example, DEFAULT_OPSET)
    export_bundle(source, bundle, ExportOptions(precision="fp32"))


def answers_of(peer: Peer, bundle: Path, own: Runner, same: Runner) -> dict[str, Any]:
    """Everything that is timed: inputs to predictions (N,) and exits (N,)."""
    manifest = own.manifest
    final = len(manifest.exits) - 1
    model = uncut_model(load_reference(bundle, manifest), manifest.exits[-1].name)
    session = open_session(model.SerializeToString(), THREADS, "uncut", left_out=())

    def uncut(inputs: Any) -> Rows:
        prediction = session.run(None, inputs)[0].argmax(1)
        return prediction, np.full(len(prediction), final)

    @torch.inference_mode()
    def eager(inputs: Any) -> Rows:
        prediction = peer.wrapper.backbone(torch.from_numpy(inputs[INPUT])).argmax(1).numpy()
        return prediction, np.full(len(prediction), final)

    def asked(call: Any) -> Any:
        def answer(inputs: Any) -> Rows:
            found = call(torch.from_numpy(inputs[INPUT]))
            logits = found.predictions if hasattr(found, "predictions") else found.prediction
            exit_index = final if found.exit_taken < 0 else found.exit_taken
            return logits.argmax(1).numpy(), np.full(len(logits), exit_index)

        return answer

    def runner(opened: Runner) -> Any:
        def answer(inputs: Any) -> Rows:
            result = opened.run(inputs)
            return result.prediction, result.exit_index

        return answer

    return {
        "PyTorch eager, uncut": eager,
        "ONNX Runtime, uncut": uncut,
        "earlyon": asked(lambda x: peer.wrapper(x, mode="inference")),
        "earlyon, staged": asked(peer.staged.infer),
        "earlyon, batched": asked(peer.wrapper.forward_inference_batched),
        "offramp, earlyon's thresholds": runner(same),
        "offramp": runner(own),
    }


def check(answers: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy and mean depth of each on single rows; exits where the same thresholds do not decide the same."""
    found, taken = {}, {}
    for name, answer in answers.items():
        said = [answer({INPUT: images[row : row + 1]}) for row in range(len(images))]
        prediction, exit_index = (np.concatenate(part) for part in zip(*said, strict=True))
        taken[name] = exit_index
        right = float((prediction == labels).mean())
        found[name] = {"accuracy": round(right, 4), "mean_depth": round(float(exit_index.mean()) + 1, 3)}
    for name in ("earlyon, staged", "offramp, earlyon's thresholds"):
        differing = int((taken[name] != taken["earlyon"]).sum())
        if differing > len(labels) // 200:  # rounding on a threshold
            raise SystemExit(f"{name} decides otherwise than earlyon on {differing} of {len(labels)} rows")
        found[name]["exits_unlike_earlyon"] = differing
    return found


def measure(folder: Path, quick: bool, seconds: float) -> dict[str, Any]:
    """Train, export, calibrate, check, time."""
    data = load_digits()
    peer = train_peer(data, 1 if quick else EPOCHS)
    torch.set_num_threads(THREADS)
    bundle = folder / "bundle"
    export_peer(peer, data["train"][0], bundle)
    images, labels = (part[:40] for part in data["test"]) if quick else data["test"]
    validation = {INPUT: data["validation"][0]}
    with (
        Runner.open(bundle, "onnxruntime", Policy.full_depth(), THREADS) as own,
        Runner.open(bundle, "onnxruntime", peer.policy, THREADS) as same,
    ):
        trace = own.record([validation], data["validation"][1])
        own.policy = calibrate(trace, CalibrateOptions(max_drop=MAX_DROP)).policy
        answers = answers_of(peer, bundle, own, same)
        found = check(answers, images, labels)
        for batch in (1, 32):
            requests = [{INPUT: images[start : start + batch]} for start in range(0, len(images), batch)]
            alone = ("earlyon", "earlyon, staged")
            chosen = {n: a for n, a in answers.items() if n not in (alone if batch > 1 else ("earlyon, batched",))}
            for name, times in time_requests(chosen, requests, seconds).items():
                found[name][f"batch_{batch}"] = times
    thresholds = {"earlyon": peer.policy.limits, "offramp": own.policy.limits}
    return {"rows": len(labels), "max_drop": MAX_DROP, "thresholds": thresholds, "alternatives": found}


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per size of request")
    parser.add_argument("--quick", action="store_true", help="one epoch and few rounds: shows the script, no result")
    options = parser.parse_args()
    result: dict[str, Any] = {"bench": "against_earlyon", "machine": describe_machine()}
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        result["skipped"] = f"{' and '.join(missing)} not installed; pip install 'earlyon==0.3.*' scikit-learn"
        progress(result["skipped"])
    else:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
            result |= measure(Path(folder), options.quick, 0.05 if options.quick else options.seconds)
        for name, found in result["alternatives"].items():
            one, many = (found.get(f"batch_{batch}", {}) for batch in (1, 32))
            progress(
                f"{name:30} accuracy {found['accuracy']:.3f}  depth {found['mean_depth']:.2f}  "
                f"mean {one.get('mean_ms', float('nan')):6.2f} ms  p50 {one.get('p50_ms', float('nan')):6.2f} ms  "
                f"{many.get('rows_per_s', float('nan')):7.0f} rows/s at 32"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
