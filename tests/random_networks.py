"""Random convolutional networks for property tests: residuals, concatenations, groups, depthwise, squeeze-and-excitation."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional


class _Act(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return {
            "relu": functional.relu,
            "silu": functional.silu,
            "sigmoid": torch.sigmoid,
            "hardswish": functional.hardswish,
            "gelu": functional.gelu,
            "none": lambda t: t,
        }[self.kind](x)


class ConvUnit(nn.Module):
    """Convolution, norm or none, activation."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel: int, groups: int = 1, pad: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            cin, cout, kernel, padding=kernel // 2 if pad else 0, groups=groups, bias=rng.random() < 0.5
        )
        kind = rng.choice(["batch", "batch", "batch", "none", "instance", "plain_batch"])
        self.norm = {
            "batch": lambda: nn.BatchNorm2d(cout),
            "none": nn.Identity,
            "instance": lambda: nn.InstanceNorm2d(cout, affine=True),
            "plain_batch": lambda: nn.BatchNorm2d(cout, affine=False),
        }[kind]()
        self.act = _Act(rng.choice(["relu", "relu", "silu", "sigmoid", "hardswish", "gelu", "none"]))

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        hidden = rng.choice([4, 6, 8, 12])
        self.a = ConvUnit(rng, cin, hidden, rng.choice(kernel_choices))
        self.b = ConvUnit(rng, hidden, cout, rng.choice(kernel_choices))
        self.short = nn.Identity() if cin == cout else ConvUnit(rng, cin, cout, 1)
        self.multiply = rng.random() < 0.15

    def forward(self, x):
        y, short = self.b(self.a(x)), self.short(x)
        return short * y if self.multiply else short + y


class Branches(nn.Module):
    """Two or three branches, concatenated."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        count = rng.choice([2, 3])
        sizes = [cout // count] * (count - 1)
        sizes.append(cout - sum(sizes))
        self.branches = nn.ModuleList(ConvUnit(rng, cin, size, rng.choice(kernel_choices)) for size in sizes)
        self.through = rng.random() < 0.3
        self.mix = nn.Conv2d(cout + cin, cout, 1) if self.through else nn.Identity()

    def forward(self, x):
        parts = [branch(x) for branch in self.branches]
        return self.mix(torch.cat([*parts, x] if self.through else parts, dim=1))


class Inverted(nn.Module):
    """Expand, depthwise or grouped, project, with squeeze-and-excitation."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        hidden = rng.choice([8, 12, 16])
        groups = rng.choice([hidden, hidden, 2, 4])
        self.expand = ConvUnit(rng, cin, hidden, 1)
        multiplier = rng.choice([1, 1, 2])
        self.depth = ConvUnit(rng, hidden, hidden * multiplier, rng.choice(kernel_choices), groups=groups)
        hidden *= multiplier
        self.squeeze = rng.random() < 0.5
        if self.squeeze:
            self.down, self.up = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project = ConvUnit(rng, hidden, cout, 1)
        self.residual = cin == cout

    def forward(self, x):
        y = self.depth(self.expand(x))
        if self.squeeze:
            y = y * torch.sigmoid(self.up(functional.relu(self.down(y.mean((2, 3), keepdim=True)))))
        y = self.project(y)
        return x + y if self.residual else y


class Shuffle(nn.Module):
    """Split in two, convolve one half, concatenate and shuffle the channels."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        self.first = ConvUnit(rng, cin, cout - cout % 2, 1)
        half = cout // 2
        self.branch = ConvUnit(rng, half, half, rng.choice(kernel_choices))
        self.last = ConvUnit(rng, 2 * half, cout, 1)

    def forward(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        y = torch.cat([a, self.branch(b)], dim=1)
        n, c, h, w = y.shape
        return self.last(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Gate(nn.Module):
    """A gated unit: chunk, then value times sigmoid."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, 2 * cout, 1)

    def forward(self, x):
        return functional.glu(self.conv(x), dim=1)


class Up(nn.Module):
    """Down by a strided convolution and up by a transposed one."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernel_choices: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.Conv2d(cin, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, cout, 2, stride=2, groups=rng.choice([1, 2] if cout % 2 == 0 else [1]))
        self.scale = nn.Parameter(torch.rand(1, cout, 1, 1) + 0.5)

    def forward(self, x):
        return self.up(functional.leaky_relu(self.down(x))) * self.scale


BLOCKS = [ConvUnit, Residual, Branches, Inverted, Shuffle, Gate, Up]


class RandomCNN(nn.Module):
    """A stem, two to five random blocks, a head by flatten or by global average.

    ``padded=False`` makes every convolution 1 x 1, so that nothing is padded with zeros.
    """

    def __init__(self, seed: int, *, padded: bool = True) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        kernels = (1, 3) if padded else (1,)
        channels = rng.choice([4, 6, 8])
        self.stem = ConvUnit(rng, 3, channels, kernels[-1])
        blocks = []
        for _ in range(rng.randint(2, 5)):
            out = rng.choice([channels, 4, 6, 8, 10])
            kind = rng.choice(BLOCKS)
            blocks.append(
                kind(rng, channels, out, rng.choice(kernels)) if kind is ConvUnit else kind(rng, channels, out, kernels)
            )
            if kind is Shuffle:
                out = out
            channels = out
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AvgPool2d(2) if rng.random() < 0.5 else nn.MaxPool2d(2)
        self.flat = rng.random() < 0.5
        width = channels * 16 if self.flat else channels
        self.hidden = nn.Linear(width, 12)
        self.head = nn.Linear(12, 5)
        trained_like(self, seed)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.pool(x)
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.head(functional.relu(self.hidden(x)))


def trained_like(model: nn.Module, seed: int = 0) -> None:
    """Give norms statistics and affine parameters as training would, so that nothing is hidden by zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not isinstance(module, nn.modules.batchnorm._NormBase):
                    continue
                if name in ("weight", "running_var"):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                elif name in ("bias", "running_mean"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
