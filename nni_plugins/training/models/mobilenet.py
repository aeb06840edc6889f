"""MobileNetV2 (Sandler et al., 2018) for small images: stride 1 where the original halves 224-pixel images early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

# expansion, channels, blocks, stride (the paper's table 2, with the first two strides taken out)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        norm=nn.BatchNorm2d(width),
    )
    if act:
        layers["act"] = nn.ReLU6()
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where shapes allow."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion != 1:
            layers["expand"] = _conv(channels, inner, 1)
        layers["depthwise"] = _conv(inner, inner, 3, stride, groups=inner)
        layers["project"] = _conv(inner, width, 1, act=False)
        self.body = nn.Sequential(layers)
        self.shortcut = stride == 1 and channels == width

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[batch, width, height / stride, width / stride]``."""
        out = self.body(images)
        return images + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """Stem, seven stages (``stage1`` to ``stage7``), a wide 1x1 convolution and a linear head."""

    def __init__(self, shape: Sequence[int], classes: int, width: float, dropout: float) -> None:
        super().__init__()

        def scaled(channels: float) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        channels = scaled(32)
        self.stem = _conv(shape[0], channels, 3)
        for number, (expansion, out, blocks, stride) in enumerate(STAGES, 1):
            layers = []
            for index in range(blocks):
                layers.append(InvertedResidual(channels, scaled(out), expansion, stride if index == 0 else 1))
                channels = scaled(out)
            self.add_module(f"stage{number}", nn.Sequential(*layers))
        last = scaled(1280 * max(1.0, width) / width)
        self.last = _conv(channels, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of images ``[batch, channels, height, width]``."""
        out = self.stem(images)
        for number in range(1, len(STAGES) + 1):
            out = getattr(self, f"stage{number}")(out)
        return self.head(self.dropout(self.pool(self.last(out)).flatten(1)))


def mobilenetv2(shape: Sequence[int], classes: int, width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """Build MobileNetV2 for images of about 32 pixels.

    Parameters
    ----------
    shape
        ``(channels, height, width)`` of one image.
    classes
        Number of outputs.
    width
        Multiplier of all channels, which stay multiples of 8.
    dropout
        Before the head.
    """
    return MobileNetV2(shape, classes, width, dropout)
