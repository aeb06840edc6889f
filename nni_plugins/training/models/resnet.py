"""Residual nets for small images (He et al., "Deep residual learning for image recognition", 2016, section 4.2).

Where the size changes, the shortcut is a 1x1 convolution with batch norm (option B of the paper), which a channel
graph can prune, while option A pads with zero channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[batch, width, height / stride, width / stride]``."""
        out = self.relu(self.bn1(self.conv1(images)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(images))


class SmallResNet(nn.Module):
    """A 3x3 stem and three stages (``layer1`` to ``layer3``) of basic blocks."""

    def __init__(self, shape: Sequence[int], classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of images ``[batch, channels, height, width]``."""
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(self.pool(out).flatten(1))


def resnet8(shape: Sequence[int], classes: int, width: int = 16) -> nn.Module:
    """Build a ResNet with one block a stage; ``width`` is the channels of the first stage."""
    return SmallResNet(shape, classes, 1, width)


def resnet20(shape: Sequence[int], classes: int, width: int = 16) -> nn.Module:
    """Build the ResNet-20 of CIFAR; ``width`` is the channels of the first stage."""
    return SmallResNet(shape, classes, 3, width)


def resnet56(shape: Sequence[int], classes: int, width: int = 16) -> nn.Module:
    """Build the ResNet-56 of CIFAR; ``width`` is the channels of the first stage."""
    return SmallResNet(shape, classes, 9, width)
