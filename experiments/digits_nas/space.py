"""Small residual networks for digits: width, depth, kernel and activation can be chosen, each stage be pruned."""

import nni
import torch
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableBatchNorm2d, MutableConv2d, MutableLinear, Repeat
from torch import nn

from nni_plugins.search import PrunedSpace


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride, kernel, stage):
        super().__init__()
        self.conv1 = MutableConv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm1 = MutableBatchNorm2d(outputs)
        self.act1 = LayerChoice({"relu": nn.ReLU(), "silu": nn.SiLU()}, label="activation")
        self.conv2 = MutableConv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = MutableBatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.down = None
        if stride > 1 or stage:
            self.down = nn.Sequential(
                MutableConv2d(inputs, outputs, 1, stride=stride, bias=False), MutableBatchNorm2d(outputs)
            )

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        return self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))) + shortcut)


class DigitsNet(ModelSpace):
    """A stem and three stages of one or two blocks. Of each choice the first is the default architecture's."""

    def __init__(self):
        super().__init__()
        base, size = nni.choice("width", [16, 12, 8]), nni.choice("kernel", [3, 1, 5])
        self.stem = nn.Sequential(MutableConv2d(1, base, 3, padding=1, bias=False), MutableBatchNorm2d(base), nn.ReLU())
        self.stages = nn.ModuleList()
        for stage in range(3):
            inputs, outputs = base * max(1, 2 ** (stage - 1)), base * 2**stage
            first = Block(inputs, outputs, 1 if stage == 0 else 2, size, stage)
            more = Repeat(lambda index, o=outputs: Block(o, o, 1, 3, 0), (0, 1), label=f"more{stage}")
            self.stages.append(nn.Sequential(first, more))
        self.head = MutableLinear(base * 4, 10)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def digits_space():
    """Architecture and pruning together: a share of channels to keep for the stem and for each stage."""
    beginnings = ["stem", "stages.0", "stages.1", "stages.2"]
    return PrunedSpace(DigitsNet, torch.zeros(1, 1, 8, 8), ratios=(0.25, 0.5, 0.75, 1.0), groups=beginnings)
