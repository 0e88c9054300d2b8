"""Export a model of your own: any nn.Module that returns the logits of its exits, the final exit last.

    python examples/02_bring_your_own_model.py BUNDLE

From the command line the same is: offramp export PACKAGE.MODULE:factory -o BUNDLE
"""

import sys
from pathlib import Path

import torch
from torch import nn

from offramp import Policy
from offramp.export.capture import Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.runtime import Runner


class SpiralNet(nn.Module):
    """Which of two spirals is a point on? Three blocks, an exit after each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(n, 32), nn.ReLU()) for n in (2, 32, 32))
        self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(3))

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            points = block(points)
            logits.append(head(points))
        return tuple(logits)


def main(bundle: Path) -> None:
    torch.manual_seed(0)
    turn = torch.rand(2000) * 6 + 1
    labels = torch.arange(2000) % 2
    angle = turn + labels * torch.pi
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 7
    model = SpiralNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(400):
        loss = sum(nn.functional.cross_entropy(logits, labels) for logits in model(points))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    source = source_from_model("spirals", model, Example({"points": points[:64]}), opset=20)
    export_bundle(source, bundle, ExportOptions(precision="fp32"))
    with Runner.open(bundle, policy=Policy.thresholds("max_prob", [0.95, 0.95])) as runner:
        result = runner.run({"points": points.numpy()})
    print("accuracy:", (result.prediction == labels.numpy()).mean())
    print("rows per exit:", [(result.exit_index == k).sum() for k in range(3)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
