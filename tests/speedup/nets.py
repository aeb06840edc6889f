"""Six small nets of different kinds, each with its inputs, for what must work after a compaction.

They import torch only, so that a fresh process in which NNI cannot be imported can build them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-and-excitation, project, and add."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.n1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth, self.n2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)
        self.squeeze = SqueezeExcite(hidden)
        self.project, self.n3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.hardswish(self.n2(self.depth(F.hardswish(self.n1(self.expand(x))))))
        return x + self.n3(self.project(self.squeeze(y)))


class Residual(nn.Module):
    """A residual CNN: strides, a projected shortcut, depthwise, squeeze-and-excitation, any image size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inverted = Inverted(8, 16)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.short = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.inverted(F.relu(self.norm(self.stem(x))))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(y + self.short(x)).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise convolutions, LayerNorm on channels last, MLPs with a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class ViT(nn.Module):
    """Patches, a class token, nn.TransformerEncoderLayer, and one nn.MultiheadAttention that pools."""

    def __init__(self, width: int = 16, heads: int = 4, tokens: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.position = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.5)
        self.encoder = nn.Sequential(
            nn.TransformerEncoderLayer(width, heads, 24, dropout=0.0, batch_first=True),
            nn.TransformerEncoderLayer(width, heads, 24, dropout=0.0, batch_first=True, norm_first=True),
        )
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = self.norm(self.encoder(x))
        y, _ = self.pool(x[:, :1], x, x, need_weights=False)
        return self.head((x[:, :1] + y).flatten(1))


class Tagger(nn.Module):
    """Integers in: embedding, a bidirectional LSTM, a GRU, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 8, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, words):
        x, _ = self.lstm(self.embed(words))
        x, _ = self.gru(x)
        return self.out(F.relu(self.hidden(x)))


class UNet(nn.Module):
    """Down, up by transposed convolutions, skip connections by concatenation, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.PReLU(12))
        self.c = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())
        self.up1, self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.d = nn.Sequential(nn.Conv2d(24, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.e = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up1(c), b], dim=1))
        return self.out(self.e(torch.cat([self.up2(d), a], dim=1)))


class Pair(nn.Module):
    """Two inputs, a dictionary out with a list in it, and a branch that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.mix = nn.Linear(16, 10)
        self.boxes, self.scores = nn.Linear(10, 4), nn.Linear(10, 3)

    def forward(self, image, vector, scale: float = 1.0):
        x = self.image(image).mean((2, 3))
        y = self.image(image * 0.5).amax((2, 3))
        z = F.silu(self.mix(torch.cat([x, y, vector * scale], dim=1)))
        return {"boxes": self.boxes(z), "more": [self.scores(z), x.sum()]}


@dataclass(frozen=True)
class Case:
    """A net: how it is built, inputs for ``batch`` samples (of another size with ``larger``), and what it prunes."""

    build: Callable[[], nn.Module]
    inputs: Callable[..., tuple[Any, ...]]
    exact_only: bool = True
    larger: bool = True


def _images(batch: int = 2, larger: bool = False) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 12 if larger else 8, 16 if larger else 8),)


def _words(batch: int = 2, larger: bool = False) -> tuple[Any, ...]:
    return (torch.randint(0, 20, (batch, 9 if larger else 6)),)


def _pair(batch: int = 2, larger: bool = False) -> tuple[Any, ...]:
    return (*_images(batch, larger), torch.randn(batch, 4))


CASES = {
    "residual": Case(Residual, _images),
    "convnext": Case(ConvNeXt, _images),
    "convnext_inexact": Case(ConvNeXt, _images, exact_only=False),
    "vit": Case(ViT, _images, larger=False),
    "lstm": Case(Tagger, _words),
    "unet": Case(UNet, _images),
    "pair": Case(Pair, _pair),
}
