"""A small convolutional network for images with a branch after every block, in the manner of BranchyNet.

BranchyNet (arXiv 1709.01686) puts a side branch of a convolution and a classifier after the first layers of LeNet,
AlexNet and ResNet; here the trunk is blocks of convolution, batch norm and ReLU, halved in size between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError

BRANCH_CHANNELS = 32


@dataclass(frozen=True)
class BranchyNetConfig:
    """The shape of the network: `channels` of every block, `depth` convolutions each, an exit after each.

    Images are (`image_channels`, `image_size`, `image_size`). Raises OptionError.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    depth: int = 2
    num_classes: int = 10
    image_channels: int = 1
    image_size: int = 28
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = (*self.channels, self.depth, self.image_channels, self.image_size >> max(0, len(self.channels) - 1))
        if not self.channels or min(sizes) < 1:
            raise OptionError(f"branchynet: got {self}, expected sizes from 1, and pixels left after halving per block")
        if self.num_classes < 2 or not 0 <= self.dropout < 1:
            raise OptionError(f"branchynet: got {self}, expected 2 classes or more and a dropout in [0, 1)")

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the blocks after which there are exits: all."""
        return tuple(range(1, len(self.channels) + 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of one image."""
        return self.image_channels, self.image_size, self.image_size


class BranchyNet(nn.Module):
    """Blocks whose forward returns the logits (N, C) of every exit in order, the final exit last."""

    def __init__(self, config: BranchyNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.image_channels, *config.channels)
        self.blocks = nn.ModuleList(block(before, after, config.depth) for before, after in pairwise(widths))
        last = len(config.channels) - 1
        self.heads = nn.ModuleList(
            ConvolutionalHead(width, config.num_classes, config.dropout, BRANCH_CHANNELS if place < last else 0)
            for place, width in enumerate(config.channels)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Classify N images: pixels (N, channels, height, width) in [0, 1]."""
        logits = []
        for place, (trunk, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            pixels = trunk(functional.max_pool2d(pixels, 2) if place else pixels)
            logits.append(head(pixels))
        return tuple(logits)


class ConvolutionalHead(nn.Module):
    """The mean over places of a convolution (0 `features`: of what comes in), then the classes."""

    def __init__(self, width: int, num_classes: int, dropout: float, features: int) -> None:
        super().__init__()
        self.branch = block(width, features, 1) if features else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(features or width, num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Classify N rows: hidden (N, channels, height, width) to (N, C)."""
        pooled = functional.adaptive_avg_pool2d(self.branch(hidden), 1)  # (N, channels, 1, 1)
        logits: Tensor = self.classes(self.dropout(torch.flatten(pooled, 1)))
        return logits


def block(before: int, after: int, depth: int) -> nn.Sequential:
    """Return `depth` times a 3x3 convolution, batch norm and ReLU."""
    parts: list[nn.Module] = []
    for width in [before] + [after] * (depth - 1):
        parts += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts)
