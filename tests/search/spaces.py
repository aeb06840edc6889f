"""Model spaces for tests, named ``tests.search.spaces:function`` where they go to another process."""

from __future__ import annotations

import nni
import torch
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableBatchNorm2d, MutableConv2d, Repeat
from torch import Tensor, nn

from nni_plugins.search import PrunedSpace

SHAPE = (2, 1, 8, 8)


def convolution(inputs: object, outputs: object, kernel: object) -> nn.Module:
    return nn.Sequential(MutableConv2d(inputs, outputs, kernel, padding="same"), MutableBatchNorm2d(outputs), nn.ReLU())


class Net(ModelSpace):
    """Width, kernel, depth and kind of layer can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        width, kernel = nni.choice("width", [8, 16]), nni.choice("kernel", [1, 3])
        self.stem = convolution(1, width, 3)
        self.body = Repeat(lambda index: convolution(width, width, kernel), (1, 3), label="depth")
        narrow = nn.Sequential(MutableConv2d(width, width, 3, padding=1, groups=width), MutableConv2d(width, 12, 1))
        self.mix = LayerChoice({"wide": MutableConv2d(width, 12, 3, padding=1), "narrow": narrow}, label="kind")
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.body(self.stem(x))).relu().mean((2, 3)))


class Loose(ModelSpace):
    """A mutable of its own, and no ``freeze``: NNI can only make it again."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        hidden = self.add_mutable(nni.choice("hidden", [6, 12]))
        size = nni.mutable.ensure_frozen(hidden)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, size), nn.ReLU(), nn.Linear(size, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Plain(nn.Module):
    """No choice at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def joint() -> PrunedSpace:
    torch.manual_seed(0)
    return PrunedSpace(Net(), torch.zeros(SHAPE), groups="stage")
