"""A multilayer perceptron and a plain convolutional net."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


def mlp(shape: Sequence[int], classes: int, hidden: Sequence[int] = (256, 128), batch_norm: bool = False) -> nn.Module:
    """Build a multilayer perceptron.

    Parameters
    ----------
    shape
        Of one input; it is flattened.
    classes
        Number of outputs.
    hidden
        Units of each hidden layer (``layer1``, ``layer2``, ...).
    batch_norm
        Normalise each hidden layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(shape)
    for number, units in enumerate(hidden, 1):
        layers[f"layer{number}"] = nn.Linear(width, units)
        if batch_norm:
            layers[f"norm{number}"] = nn.BatchNorm1d(units)
        layers[f"act{number}"] = nn.ReLU()
        width = units
    layers["head"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


class SmallCNN(nn.Module):
    """Stages of 3x3 convolutions with batch norm; each stage but the first halves the image."""

    def __init__(self, shape: Sequence[int], classes: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        channels = shape[0]
        self.stages = len(widths)
        for number, width in enumerate(widths, 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(1, depth + 1):
                stride = 2 if index == 1 and number > 1 else 1
                layers[f"conv{index}"] = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
                layers[f"norm{index}"] = nn.BatchNorm2d(width)
                layers[f"act{index}"] = nn.ReLU()
                channels = width
            self.add_module(f"stage{number}", nn.Sequential(layers))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of images ``[batch, channels, height, width]``."""
        for number in range(1, self.stages + 1):
            images = getattr(self, f"stage{number}")(images)
        return self.head(self.pool(images).flatten(1))


def small_cnn(shape: Sequence[int], classes: int, widths: Sequence[int] = (16, 32, 64), depth: int = 2) -> nn.Module:
    """Build a plain convolutional net.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of one image.
    classes
        Number of outputs.
    widths
        Channels of each stage (``stage1``, ``stage2``, ...).
    depth
        Convolutions in a stage.
    """
    return SmallCNN(shape, classes, widths, depth)
