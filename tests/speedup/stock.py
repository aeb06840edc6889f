"""NNI's own ModelSpeedup, quiet, and small nets of module types that it knows, half knows or lacks."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from dataclasses import dataclass

import torch
from nni.compression.speedup import ModelSpeedup as StockSpeedup
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import MASK_UPDATERS, REPLACERS
from tests.random_networks import trained_like

QUIET = logging.getLogger("tests.quiet")
QUIET.setLevel(logging.CRITICAL)


def stock(model, x, masks, **options):
    """What NNI's speedup makes of a copy of the model, in eval mode."""
    with contextlib.redirect_stdout(io.StringIO()):
        speedup = StockSpeedup(copy.deepcopy(model), x, copy.deepcopy(masks), logger=QUIET, **options)
        return speedup.speedup_model().eval()


def replacers():
    return {"customized_replacers": list(REPLACERS)}


def both():
    return {"customized_replacers": list(REPLACERS), "customized_mask_updaters": list(MASK_UPDATERS)}


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def bake(model, masks):
    """Multiply the masks into a copy of the model."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(name), target).mul_(mask)
    return model


def every_second(model, x):
    """Masks that agree with each other: every second unit of every group goes, in all that it reaches."""
    graph = ChannelGraph.watch(model, x)
    return Plan(graph, {g.name: range(0, g.size, 2) for g in graph.groups if g.prunable}).masks(model)


def rows(model, names, share=0.5, seed=0):
    """Masks as pruners make them: rows of some layers, and their biases, chosen without a look at the others."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in names:
        module = model.get_submodule(name)
        masks[name] = {}
        for target, weight in module.named_parameters(recurse=False):
            if "weight" not in target:
                continue
            dim = 1 if getattr(module, "transposed", False) else 0
            keep = (torch.rand(weight.shape[dim], generator=generator) > share).float()
            shape = [-1 if d == dim else 1 for d in range(weight.dim())]
            masks[name][target] = keep.reshape(shape).expand(weight.shape).contiguous()
            bias = target.replace("weight", "bias")
            if weight.dim() > 1 and getattr(module, bias, None) is not None:
                masks[name][bias] = keep
    return masks


@dataclass(frozen=True)
class Case:
    """A net, its input, and what the stock speedup needs of ours for it: 'nothing', 'replacers' or 'updaters' too."""

    make: object
    shape: tuple
    needs: str
    rows: tuple = ()

    def model(self):
        torch.manual_seed(0)
        model = self.make()
        trained_like(model)
        return model.eval()

    def input(self):
        generator = torch.Generator().manual_seed(1)
        if isinstance(self.shape[0], str):
            return torch.randint(0, 20, self.shape[1:], generator=generator)
        return torch.randn(self.shape, generator=generator)


def head(dims, channels):
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    return [pool(1), nn.Flatten(), nn.Linear(channels, 4)]


def seq(*modules):
    return lambda: nn.Sequential(*(part() if isinstance(part, type) else part for part in modules))


class Residual3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        return self.head((x + self.norm(self.b(x))).mean((2, 3, 4)))


class UpTo(nn.Module):
    """A transposed convolution called with a keyword."""

    def __init__(self):
        super().__init__()
        self.a, self.up, self.b = nn.Conv3d(3, 8, 1), nn.ConvTranspose3d(8, 6, 3, stride=2), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.up(self.a(x), output_size=[10, 9, 10]).mean((2, 3, 4)))


class Attention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.need_weights = need_weights
        self.a, self.mha, self.b = nn.Linear(8, 16), nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.mha(x, x, x, need_weights=self.need_weights)[0])


class Cross(nn.Module):
    """Attention with keys and values of other widths: three projections in place of a packed one."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 12)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True, kdim=12, vdim=8, bias=False)
        self.b = nn.Linear(16, 4)

    def forward(self, x):
        return self.b(self.mha(self.q(x), self.kv(x), x)[0])


class Heads(nn.Module):
    """Attention written by hand: the number of heads is an attribute, and a bare parameter scales the result."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv, self.out, self.b = nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.b(self.out((weights @ v).transpose(1, 2).reshape(b, n, -1)) * self.scale)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.a, self.r = nn.Linear(8, 16), kind(16, 12, batch_first=True, **options)
        self.b = nn.Linear(24 if options.get("bidirectional") else options.get("proj_size", 12), 4)

    def forward(self, x):
        return self.b(self.r(self.a(x))[0])


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(8, 16), kind(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(self.a(x[:, step]), state)
        return self.b(state[0] if isinstance(state, tuple) else state)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.bilinear = nn.Linear(8, 16), nn.Linear(8, 12), nn.Bilinear(16, 12, 10)
        self.b = nn.Linear(10, 4)

    def forward(self, x):
        return self.b(self.bilinear(self.a(x), self.c(x)))


class Closed(nn.Module):
    """A module of torch's that has others inside, and that NNI's tracer does not look into."""

    def __init__(self, inside, copies=1):
        super().__init__()
        self.inside, self.copies, self.b = inside, copies, nn.Linear(16, 4)

    def forward(self, x):
        return self.b(self.inside(*[x] * self.copies))


def layer(kind, **options):
    return kind(16, 4, dim_feedforward=32, batch_first=True, **options)


def shuffles_backwards():
    """Torch 2.4 cannot differentiate a channel shuffle, by which NNI infers masks."""
    try:
        nn.functional.channel_shuffle(torch.ones(1, 4, 1, 1, requires_grad=True), 2).sum().backward()
    except RuntimeError:
        return False
    return True


IMAGE, LINE, CUBE, WORDS = (2, 3, 6, 6), (2, 3, 12), (2, 3, 6, 6, 6), (2, 5, 8)
CASES = {
    "conv3d": Case(
        seq(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU, nn.MaxPool3d(2), nn.Conv3d(8, 8, 1), *head(3, 8)),
        CUBE, "replacers", ("0", "4"),
    ),
    "grouped conv3d": Case(
        seq(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 3, groups=4), nn.BatchNorm3d(8), nn.Conv3d(8, 8, 1), *head(3, 8)),
        CUBE, "replacers", ("0", "1", "3"),
    ),
    "residual of conv3d": Case(Residual3d, CUBE, "replacers", ("a", "b")),
    "instance norm": Case(
        seq(nn.Conv3d(3, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.AvgPool3d(2), nn.Conv3d(8, 8, 1), *head(3, 8)),
        CUBE, "replacers",
    ),
    "1-d": Case(
        seq(nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.ReLU, nn.MaxPool1d(2), nn.ReplicationPad1d(1),
            nn.Conv1d(8, 8, 1), *head(1, 8)),
        LINE, "replacers",
    ),
    "transposed 1-d": Case(
        seq(nn.Conv1d(3, 8, 3), nn.ReLU, nn.ConvTranspose1d(8, 6, 2, stride=2), nn.ReLU, *head(1, 6)),
        LINE, "replacers", ("0", "2"),
    ),
    "transposed 3-d": Case(
        seq(nn.Conv3d(3, 8, 3), nn.ReLU, nn.ConvTranspose3d(8, 6, 2, stride=2), nn.ReLU, *head(3, 6)),
        CUBE, "replacers", ("0", "2"),
    ),
    "transposed 3-d, grouped": Case(
        seq(nn.Conv3d(3, 8, 1), nn.ConvTranspose3d(8, 8, 2, groups=4), nn.ReLU, nn.Conv3d(8, 8, 1), *head(3, 8)),
        CUBE, "replacers",
    ),
    "called with a keyword": Case(UpTo, (2, 3, 4, 4, 4), "replacers", ("a", "up")),
    "upsampled 3-d": Case(
        seq(nn.Conv3d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv3d(8, 8, 1), *head(3, 8)), CUBE, "replacers"
    ),
    "rms norm": Case(seq(nn.Linear(8, 16), nn.RMSNorm(16), nn.GELU, nn.Linear(16, 4)), WORDS, "replacers"),
    "bilinear": Case(Bilinear, (3, 8), "replacers", ("a", "c", "bilinear")),
    "embedding bag": Case(seq(nn.EmbeddingBag(20, 16), nn.Linear(16, 4)), ("words", 2, 5), "replacers"),
    "glu": Case(seq(nn.Conv2d(3, 16, 3), nn.GLU(1), nn.Conv2d(8, 8, 1), *head(2, 8)), IMAGE, "nothing", ("0", "2")),
    "group norm": Case(
        seq(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1), *head(2, 8)), IMAGE, "nothing", ("0", "2")
    ),
    "pixel shuffle": Case(
        seq(nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), nn.Conv2d(8, 8, 1), *head(2, 8)), IMAGE, "nothing", ("0", "2")
    ),
    "pixel unshuffle": Case(
        seq(nn.Conv2d(3, 8, 3), nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 1), *head(2, 8)), IMAGE, "nothing", ("0", "2")
    ),
    "channel shuffle": Case(
        seq(nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2), *head(2, 8)),
        IMAGE, "nothing" if shuffles_backwards() else "updaters", ("0", "2"),
    ),
    "prelu": Case(
        seq(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 1), nn.PReLU, *head(2, 8)), IMAGE, "nothing", ("0", "2")
    ),
    "embedding": Case(seq(nn.Embedding(20, 16), nn.Linear(16, 4)), ("words", 2, 5), "nothing"),
    "unfold": Case(
        seq(nn.Conv2d(3, 8, 1), nn.Unfold(2), nn.Conv1d(32, 8, 1), *head(1, 8)), IMAGE, "nothing", ("0", "2")
    ),
    "attention": Case(lambda: Attention(False), WORDS, "updaters", ("a", "mha")),
    "attention with its weights": Case(lambda: Attention(True), WORDS, "updaters", ("a", "mha")),
    "attention of three widths": Case(Cross, WORDS, "updaters", ("q", "kv")),
    "attention by hand": Case(Heads, WORDS, "updaters", ("qkv", "out")),
    "lstm": Case(lambda: Recurrent(nn.LSTM), WORDS, "updaters", ("a", "r")),
    "lstm, two layers both ways": Case(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), WORDS, "updaters", ("a", "r")
    ),
    "gru": Case(lambda: Recurrent(nn.GRU), WORDS, "updaters", ("a", "r")),
    "gru without biases": Case(lambda: Recurrent(nn.GRU, bias=False), WORDS, "updaters", ("a", "r")),
    "rnn": Case(lambda: Recurrent(nn.RNN), WORDS, "updaters", ("a", "r")),
    "lstm cell": Case(lambda: Cell(nn.LSTMCell), WORDS, "updaters", ("a", "cell")),
    "lstm with a projection": Case(lambda: Recurrent(nn.LSTM, proj_size=6), WORDS, "updaters", ("a", "r")),
    "rnn cell": Case(lambda: Cell(nn.RNNCell), WORDS, "updaters", ("a", "cell")),
    "gru cell": Case(lambda: Cell(nn.GRUCell), WORDS, "updaters", ("a", "cell")),
    "encoder layer": Case(lambda: Closed(layer(nn.TransformerEncoderLayer)), (2, 5, 16), "updaters"),
    "encoder": Case(
        lambda: Closed(nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2)), (2, 5, 16), "updaters"
    ),
    "decoder layer": Case(lambda: Closed(layer(nn.TransformerDecoderLayer), 2), (2, 5, 16), "updaters"),
    "transformer": Case(
        lambda: Closed(nn.Transformer(16, 4, 1, 1, 32, batch_first=True), 2), (2, 5, 16), "updaters"
    ),
}  # fmt: skip
