"""Random networks for property tests that mix convolutions, norms and attention: images, tokens, or one and then the other."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional

from tests.random_attention import Attention, Mlp, Packed, Sublayer, token_norm
from tests.random_networks import BLOCKS, trained_like


class ChannelsLast(nn.Module):
    """A norm over the channels of an image, as ConvNeXt has it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def image_norm(rng: random.Random, dim: int) -> nn.Module:
    return rng.choice(
        [
            lambda: nn.BatchNorm2d(dim),
            lambda: nn.GroupNorm(rng.choice([1, 2]), dim),
            lambda: nn.InstanceNorm2d(dim, affine=True),
            lambda: ChannelsLast(dim),
            nn.Identity,
        ]
    )()


class Pyramid(nn.Module):
    """Depthwise with a norm, a wide middle, a LayerScale, and a residual: ConvNeXt's and MobileNet's kind."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        hidden = rng.choice([8, 12])
        self.depth = nn.Conv2d(cin, cin, 3, padding=1, groups=cin)
        self.norm = image_norm(rng, cin)
        self.up = nn.Conv2d(cin, hidden, 1)
        self.inner_norm = image_norm(rng, hidden)
        self.down = nn.Conv2d(hidden, cin, 1)
        self.scale = nn.Parameter(torch.rand(cin, 1, 1) + 0.5) if rng.random() < 0.5 else None
        self.out = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        y = self.down(functional.gelu(self.inner_norm(self.up(self.norm(self.depth(x))))))
        return self.out(x + (y if self.scale is None else y * self.scale))


class Grouped(nn.Module):
    """A grouped convolution whose channels are shuffled after it."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.groups = rng.choice([2, 4])
        self.up = nn.Conv2d(cin, 8, 1)
        self.middle = nn.Conv2d(8, 16, 3, padding=1, groups=self.groups)
        self.norm = rng.choice([nn.BatchNorm2d(16), nn.GroupNorm(self.groups, 16), nn.Identity()])
        self.down = nn.Conv2d(16, cout, 1, groups=rng.choice([1, 2]) if cout % 2 == 0 else 1)
        self.own = rng.random() < 0.5
        self.shuffle = nn.ChannelShuffle(self.groups)

    def forward(self, x):
        x = functional.relu(self.norm(self.middle(functional.relu(self.up(x)))))
        if self.own:
            n, c, h, w = x.shape
            return self.down(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).flatten(1, 2))
        return self.down(self.shuffle(x))


class Looking(nn.Module):
    """Attention over the places of an image: by 1 x 1 convolutions, or by a token layer on the flattened image."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.inner = rng.choice([2, 3]), 12
        self.norm = image_norm(rng, cin)
        self.q, self.k, self.v = (nn.Conv2d(cin, self.inner, 1) for _ in range(3))
        self.across = rng.random() < 0.3  # channels look at channels
        self.down = nn.Conv2d(self.inner, cout, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.norm(x)
        q, k, v = (layer(x).reshape(n, self.heads, -1, h * w) for layer in (self.q, self.k, self.v))
        if self.across:
            y = (q @ k.transpose(-2, -1) / h).softmax(-1) @ v
        else:
            y = v @ (q.transpose(-2, -1) @ k / 2).softmax(-1).transpose(-2, -1)
        return self.down(y.reshape(n, -1, h, w))


class Shortcut(nn.Module):
    """Joins what comes in and what a part makes of it, and takes a part of the two."""

    def __init__(self, rng: random.Random, cin: int, cout: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.part = nn.Conv2d(cin, 6, 3, padding=1)
        self.norm = image_norm(rng, cin + 6)
        self.mix = nn.Conv2d(cin + 6, cout, 1)
        self.twice = rng.random() < 0.3

    def forward(self, x):
        y = self.mix(self.norm(torch.cat([functional.silu(self.part(x)), x], dim=1)))
        return y + self.mix(self.norm(torch.cat([self.part(x), x], dim=1))) if self.twice else y


IMAGE_PARTS = [*BLOCKS, Pyramid, Pyramid, Grouped, Looking, Looking, Shortcut]


class RandomNetwork(nn.Module):
    """Of an image: a stem, image parts, token layers, a head. Of tokens: an embedding, token layers, a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.kind = rng.choice(["image", "both", "both", "words", "words", "frames"])
        dim, tokens = rng.choice([6, 8, 12]), 7
        image: list[nn.Module] = []
        self.stem: nn.Module
        if self.kind in ("image", "both"):
            tokens, channels = 16, rng.choice([4, 6, 8])
            self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), image_norm(rng, channels), nn.ReLU())
            for _ in range(rng.randint(1, 2) if self.kind == "both" else rng.randint(2, 4)):
                out = rng.choice([channels, 4, 6, 8])
                part = rng.choice(IMAGE_PARTS)
                image.append(part(rng, channels, out, 3 if part is BLOCKS[0] else (1, 3)))
                channels = out
            self.patch = nn.Conv2d(channels, dim, 2, stride=2)
        elif self.kind == "words":
            self.stem = nn.Embedding(11, dim)
        else:
            self.stem = nn.Conv1d(3, dim, 3, padding=1)
        self.image = nn.Sequential(*image)
        self.place = nn.Parameter(torch.randn(1, tokens, dim)) if rng.random() < 0.5 else None
        self.first = nn.Parameter(torch.randn(1, 1, dim)) if rng.random() < 0.3 else None
        tokens += self.first is not None
        layers: list[nn.Module] = []
        if self.kind != "image":
            layers.append(Sublayer(rng, dim, tokens, rng.choice([Attention, Packed])))
            layers.append(Sublayer(rng, dim, tokens, Mlp))
            layers += [Sublayer(rng, dim, tokens) for _ in range(min(rng.randint(0, 3), 1))]
            if rng.random() < 0.08:
                layers.append(nn.TransformerEncoderLayer(dim, 2, 10, batch_first=True, norm_first=rng.random() < 0.5))
        self.layers = nn.ModuleList(layers)
        self.norm = token_norm(rng, dim)
        self.pool = rng.choice(["mean", "first", "flat"])
        self.hidden = nn.Linear(dim * tokens if self.pool == "flat" else dim, 9)
        self.tied = self.kind == "words" and rng.random() < 0.4
        self.head = nn.Linear(dim, 11, bias=False) if self.tied else nn.Linear(9, 4)
        if self.tied:
            self.head.weight = self.stem.weight
        trained_like(self, seed)
        _shaken(self)

    def example(self, batch: int = 2) -> torch.Tensor:
        """An input, the same each time."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "words":
            return torch.randint(0, 11, (batch, 7), generator=generator)
        shape = (batch, 3, 7) if self.kind == "frames" else (batch, 3, 8, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, x):
        x = self.stem(x)
        if self.kind == "frames":
            x = x.transpose(1, 2)
        elif self.kind != "words":
            x = self.patch(self.image(x)).flatten(2).transpose(1, 2)
        x = x if self.place is None else x + self.place
        x = x if self.first is None else torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if self.tied:
            return self.head(x)
        x = {"mean": lambda: x.mean(1), "first": lambda: x[:, 0], "flat": lambda: x.flatten(1)}[self.pool]()
        return self.head(functional.relu(self.hidden(x)))


def _shaken(model: nn.Module) -> None:
    """Give layer norms weights that differ, and packed attention biases that are not zero."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1 and not isinstance(module, nn.modules.batchnorm._NormBase):
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
