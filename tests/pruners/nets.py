"""Small nets, one of each kind of structure that groups have, and what tests ask of them."""

from __future__ import annotations

import torch
from torch import nn


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class Plain(nn.Module):
    """Convolutions in a row; the second has a bias and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = _norm(16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 32, 3, padding=1, stride=2, bias=False)
        self.bn3 = _norm(32)
        self.fc1 = nn.Linear(32, 40)
        self.fc2 = nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn3(self.conv3(self.conv2(x).relu())).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


class Residual(nn.Module):
    """A stream of channels that three convolutions produce."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = _norm(16)
        self.a1, self.na1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), _norm(24)
        self.a2, self.na2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), _norm(16)
        self.b1, self.nb1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), _norm(24)
        self.b2, self.nb2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), _norm(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.na2(self.a2(self.na1(self.a1(x)).relu()))).relu()
        x = (x + self.nb2(self.b2(self.nb1(self.b1(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 20, 3, padding=1)
        self.bn = _norm(32)
        self.conv = nn.Conv2d(32, 24, 3, padding=1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), _norm(16)
        self.expand, self.bn1 = nn.Conv2d(16, 48, 1, bias=False), _norm(48)
        self.depth, self.bn2 = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), _norm(48)
        self.project, self.bn3 = nn.Conv2d(48, 16, 1, bias=False), _norm(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.bn(self.stem(x)))
        y = nn.functional.relu6(self.bn2(self.depth(nn.functional.relu6(self.bn1(self.expand(x))))))
        return self.fc((x + self.bn3(self.project(y))).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution of four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), _norm(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), _norm(32)
        self.conv3 = nn.Conv2d(32, 24, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels that linear layers gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), _norm(32)
        self.down, self.up = nn.Linear(32, 8), nn.Linear(8, 32)
        self.conv2 = nn.Conv2d(32, 24, 3, padding=1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return self.fc(self.conv2(x * gate[:, :, None, None]).relu().mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "concat": Concat,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "squeeze": SqueezeExcite,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A net in eval mode whose norms look trained: statistics and affine parameters away from their start."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
EVERYTHING = ["Conv2d", "Linear"]
