"""A convolutional net whose architecture is in its arguments, for searches over architecture and pruning together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}


def _conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = OrderedDict(
        conv=nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        norm=nn.BatchNorm2d(width),
    )
    return nn.Sequential(layers)


class Block(nn.Module):
    """A path beside a shortcut (none, where ``shortcut`` says so), then an activation."""

    def __init__(self, path: nn.Module, shortcut: nn.Module | None, act: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.shortcut = shortcut
        self.act = act

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[batch, width, height / stride, width / stride]``."""
        out = self.path(images)
        return self.act(out if self.shortcut is None else out + self.shortcut(images))


def _plain(channels: int, width: int, kernel: int, stride: int, act: Callable[[], nn.Module], _: int) -> nn.Module:
    return Block(_conv(channels, width, kernel, stride), None, act())


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 and channels == width else _conv(channels, width, 1, stride)


def _residual(channels: int, width: int, kernel: int, stride: int, act: Callable[[], nn.Module], _: int) -> nn.Module:
    first, second = _conv(channels, width, kernel, stride), _conv(width, width, kernel)
    path = nn.Sequential(OrderedDict(first=first, act=act(), second=second))
    return Block(path, _shortcut(channels, width, stride), act())


def _inverted(
    channels: int, width: int, kernel: int, stride: int, act: Callable[[], nn.Module], expansion: int
) -> nn.Module:
    inner = channels * expansion
    path = nn.Sequential(
        OrderedDict(
            expand=_conv(channels, inner, 1),
            act1=act(),
            depthwise=_conv(inner, inner, kernel, stride, groups=inner),
            act2=act(),
            project=_conv(inner, width, 1),
        )
    )
    return Block(path, nn.Identity() if stride == 1 and channels == width else None, nn.Identity())


BLOCKS: dict[str, Callable[..., nn.Module]] = {"plain": _plain, "residual": _residual, "inverted": _inverted}


class Staged(nn.Module):
    """A stem and stages of blocks; each stage but the first halves the image and doubles the width."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = len(stages)
        for number, stage in enumerate(stages, 1):
            self.add_module(f"stage{number}", stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of images ``[batch, channels, height, width]``."""
        images = self.stem(images)
        for number in range(1, self.stages + 1):
            images = getattr(self, f"stage{number}")(images)
        return self.head(self.pool(images).flatten(1))


def staged(
    shape: Sequence[int],
    classes: int,
    width: int = 16,
    depth: int | Sequence[int] = 1,
    kernel: int = 3,
    block: str = "residual",
    activation: str = "relu",
    expansion: int = 4,
    stages: int = 3,
) -> nn.Module:
    """Build a net of stages.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of one image.
    classes
        Number of outputs.
    width
        Channels of the first stage (``stage1``); each further one has twice as many.
    depth
        Blocks in a stage, or one number for each stage.
    kernel
        Odd size of the kernels.
    block
        ``plain`` (one convolution), ``residual`` (two, beside a shortcut), ``inverted`` (expand, filter each channel,
        project, as in MobileNetV2).
    activation
        ``relu``, ``relu6``, ``silu``, ``gelu``, ``hardswish``.
    expansion
        Of inverted blocks.
    stages
        How many.
    """
    for name, value, known in (("block", block, BLOCKS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; it must be odd")
    depths = [depth] * stages if isinstance(depth, int) else list(depth)
    if len(depths) != stages or min(depths) < 1:
        raise ValueError(f"depth is {depth!r}; it must be a number of blocks, or one for each of {stages} stages")
    make, act = BLOCKS[block], ACTIVATIONS[activation]
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(shape[0], width, 3, padding=1, bias=False)))
    stem.add_module("norm", nn.BatchNorm2d(width))
    stem.add_module("act", act())
    built, channels = [], width
    for number, blocks in enumerate(depths):
        wide = width * 2**number
        strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
        layers = []
        for stride in strides:
            layers.append(make(channels, wide, kernel, stride, act, expansion))
            channels = wide
        built.append(nn.Sequential(*layers))
    return Staged(stem, built, channels, classes)
