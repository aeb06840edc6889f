"""Indexing, writing, norms of weights, windows, transforms: a row each, half gone equals half masked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.channels.rules_proof import Between, Call, prove

MAP = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def written(x):
    y = torch.zeros_like(x)
    y[:, :, torch.arange(3)] = x[:, :, :3]
    return y


def halves_swapped(x):
    y = torch.zeros_like(x)
    half = x.shape[1] // 2
    y[:, :half], y[:, half:] = x[:, half:], x[:, :half]
    return y


def interleaved(m, x):
    """Every other row of the input, and every other of a convolution of it, in a map of zeros."""
    y = torch.zeros(2, x.shape[1], 6, 6, dtype=x.dtype)
    y[:, :, ::2], y[:, :, 1::2] = x[:, :, ::2], m.conv(x)[:, :, 1::2]
    return y


def moved(x):
    y = x.clone()
    y[:, :, 1:] = 0.5 * x[:, :, :-1]
    return y


def backwards(x):
    return torch.arange(36).flip(0)[None, None].expand(2, x.shape[1], -1)


def spectrum_filter(m, x):
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.weight), s=(6, 6))


def whitened(m, x):
    weight = m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight / (weight.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt(), m.conv.bias, padding=1)


def whitened_by_norm(m, x):
    flat = m.conv.weight.reshape(1, m.conv.weight.shape[0], -1)
    weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(m.conv.weight)
    return F.conv2d(x, weight, m.conv.bias, padding=1)


class Parts(nn.Module):
    """Cuts at two sizes that it holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)
        self.few, self.many = 3, 5

    def forward(self, x):
        few, many = x.split([self.few, self.many], 1)
        return torch.cat([self.a(few), self.b(many)], 1)


def conv(out=6, **options):
    return nn.Conv2d(8, out, 3, padding=1, **options)


ALL = {"first": 8}
#: name -> (body, channels after it, prunable groups and their units, what stays if only producers are masked;
#: None where those leave what no bias can stand for, so that only whole masks are tried)
ROWS = {
    # picking and writing by index
    "embedding": (lambda: Call(lambda m, x: x * m.e(torch.tensor([1, 2]))[..., None, None], e=nn.Embedding(5, 8)), 8, ALL, ()),
    "gather": (lambda: Call(lambda m, x: torch.gather(x.flatten(2), 2, backwards(x)).view_as(x)), 8, ALL, ()),
    "gather by order": (lambda: Call(lambda m, x: x.flatten(2).gather(2, x.flatten(2).argsort(-1)).view_as(x)), 8, ALL, ()),
    "index of positions": (lambda: Call(lambda m, x: x[:, :, torch.arange(6).flip(0)][..., torch.tensor([0, 2, 1])]), 8, ALL, ()),
    "index of both positions": (lambda: Call(lambda m, x: x[:, :, torch.tensor([0, 1]), torch.tensor([2, 3])][..., None]), 8, ALL, ()),
    "index_select": (lambda: Call(lambda m, x: x.index_select(2, torch.tensor([1, 0]))), 8, ALL, ()),
    "scatter": (lambda: Call(lambda m, x: torch.zeros_like(x.flatten(2)).scatter(2, backwards(x), x.flatten(2)).view_as(x)), 8, ALL, ()),
    "scatter_add": (lambda: Call(lambda m, x: torch.zeros_like(x.flatten(2)).scatter_add(2, backwards(x), x.flatten(2)).view_as(x)), 8, ALL, ()),
    "index_add": (lambda: Call(lambda m, x: torch.zeros(2, x.shape[1], 4, dtype=x.dtype).index_add(2, torch.arange(36) % 4, x.flatten(2))[..., None]), 8, ALL, ()),
    "written by index": (lambda: Call(lambda m, x: written(x)), 8, ALL, ()),
    "positions written by slice": (lambda: Call(lambda m, x: moved(x)), 8, ALL, None),
    "channels written by slice": (lambda: Call(lambda m, x: halves_swapped(x)), 8, {"first": 4}, ()),
    "rows of two written into zeros": (lambda: Call(interleaved, unused=nn.Parameter(torch.randn(8)), conv=nn.Conv2d(8, 8, 1)), 8, ALL, ()),
    "picked channels stay": (lambda: Call(lambda m, x: x[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])]), 8, {}, ()),
    "places of channels stay": (lambda: Call(lambda m, x: x * x.argmax(1, keepdim=True)), 8, {}, ()),
    # taking apart
    "flipped channels": (lambda: Call(lambda m, x: x.flip(1)), 8, ALL, ()),
    "rolled channels stay": (lambda: Call(lambda m, x: x.roll(1, 1)), 8, {}, ()),
    "rolled positions": (lambda: Call(lambda m, x: x.roll((1, 2), (2, 3))), 8, ALL, ()),
    "even and odd": (lambda: Call(lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1)), 8, {"first": 4}, ()),
    "three chunks of eight": (lambda: Call(lambda m, x: torch.cat([t.relu() for t in x.chunk(3, 1)], 1)), 8, {"first": 2}, ()),
    "cut where two attributes say": (Parts, 8, {"first": 3, "first:1": 5, "body.a": 4, "body.b": 4}, ()),
    "repeated": (lambda: Call(lambda m, x: x.repeat(1, 2, 1, 1)), 16, ALL, ()),
    "a gate copied to every channel": (lambda: Call(lambda m, x: x * m.c(x).sigmoid().repeat(1, x.shape[1], 1, 1), c=nn.Conv2d(8, 1, 1)), 8, ALL, None),
    # norms
    "weight norm": (lambda: parametrizations.weight_norm(conv()), 6, {"first": 8, "body.parametrizations.weight": 6}, ("first",)),
    "weight norm of inputs": (lambda: parametrizations.weight_norm(conv(), dim=1), 6, {"first": 8, "body.parametrizations.weight": 6}, None),
    "weight norm of kernel positions": (lambda: parametrizations.weight_norm(conv(), dim=3), 6, {"first": 8, "body.parametrizations.weight": 6}, ("first",)),
    "weight norm by hooks": (lambda: weight_norm(conv()), 6, {"first": 8, "body": 6}, ("first",)),
    "weight norm of all by hooks": (lambda: weight_norm(conv(), dim=None), 6, {"first": 8, "body": 6}, ("first",)),
    "spectral norm": (lambda: parametrizations.spectral_norm(conv()), 6, {"first": 8, "body.parametrizations.weight": 6}, ("first",)),
    "spectral norm by hooks": (lambda: spectral_norm(conv()), 6, {"first": 8, "body": 6}, ("first",)),
    "weights brought to unit variance": (lambda: Call(whitened, conv=conv()), 6, {"first": -8, "body.conv": 6}, ()),
    "weights through a norm": (lambda: Call(whitened_by_norm, conv=conv()), 6, {"first": -8, "body.conv": 6}, ()),
    "two group norms": (lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)), 8, {"first": 4, "body.1": 2}, ()),
    "unit length across channels": (lambda: Call(lambda m, x: F.normalize(x, dim=1)), 8, ALL, None),
    "root mean square across channels": (lambda: Call(lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), 8, {"first": -8}, ()),
    "response norm across channels stays": (lambda: nn.LocalResponseNorm(3), 8, {}, ()),
    # windows, samples, spectra
    "unfold and fold": (lambda: Call(lambda m, x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1)), 8, ALL, None),
    "unfolded windows": (lambda: Call(lambda m, x: F.unfold(x, 3).view(2, x.shape[1], 9, 4, 4).mean(2)), 8, ALL, ()),
    "sliding windows": (lambda: Call(lambda m, x: x.unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2))), 8, ALL, ()),
    "circular padding": (lambda: Call(lambda m, x: F.pad(x, (1, 1, 2, 1), mode="circular")), 8, ALL, None),
    "padded channels": (lambda: Call(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2))), 12, ALL, ()),
    "sampled on a grid": (lambda: Call(lambda m, x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype)[None].repeat(2, 1, 1), list(x.shape), False), align_corners=False)), 8, ALL, None),
    "pooled and put back": (lambda: Call(lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), 8, ALL, None),
    "filtered in the spectrum": (lambda: Call(spectrum_filter, weight=nn.Parameter(torch.randn(8, 6, 4, 2))), 8, ALL, None),
    "spectrum across channels stays": (lambda: Call(lambda m, x: torch.fft.fft(x, dim=1).real), 8, {}, ()),
    "transposed with output padding": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), 6, {"first": 8, "body": 6}, None),
    "transposed, depthwise, two each": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2, groups=8), 16, ALL, None),
    # products and sums
    "running sums of positions": (lambda: Call(lambda m, x: x.cumsum(2)), 8, ALL, None),
    "running sums of channels": (lambda: Call(lambda m, x: x.cumsum(1)), 8, ALL, ("first",)),
    "distances to a table": (lambda: Call(lambda m, x: torch.cdist(x.flatten(2).transpose(1, 2), m.w).transpose(1, 2).unflatten(2, (6, 6)), w=nn.Parameter(torch.randn(7, 8))), 7, {"first": 8, "body": 7}, None),
    "products of channels": (lambda: Call(lambda m, x: (torch.einsum("bchw,bdhw->bcd", x, x).softmax(-1) @ x.flatten(2)).view_as(x)), 8, {"first": -8}, ()),
    "angles between maps": (lambda: Call(lambda m, x: x * F.cosine_similarity(x, m.c(x), dim=1)[:, None], c=nn.Conv2d(8, 8, 1)), 8, ALL, None),
    "a bias table that is written": (lambda: Call(lambda m, x: x + torch.cat([m.b.chunk(2)[0], m.b.chunk(2)[1].clone().zero_()])[:, None, None], b=nn.Parameter(torch.randn(8))), 8, {"first": 4}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    body, width, expected, stays = ROWS[name]
    prove(Between(body(), width), MAP, expected, stays)


def test_a_bilinear_layer():
    model = nn.Sequential(
        nn.Linear(3, 8),
        Call(lambda m, x: m.both(x, m.other(x)), both=nn.Bilinear(8, 6, 7), other=nn.Linear(8, 6)),
        nn.Linear(7, 2),
    )
    prove(model, torch.randn(4, 3), {"0": 8, "1.other": 6, "1.both": 7}, stays=None)


def test_inference_mode_inside_a_forward():
    class Frozen(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x).clone()

    prove(Frozen(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), MAP, {"0": 8})
