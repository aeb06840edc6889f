"""torchvision's shifted-window attention with any number of heads, and any width of a head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class _FlexibleWindows:
    """Attention inside windows of a map ``[batch, height, width, channels]``, shifted in every other block.

    Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021.
    """

    num_heads: int
    head_dim: int

    @staticmethod
    def remembered(module: Any) -> dict[str, Any]:
        """The width of a head, by which scores are scaled: it must stay when the weights shrink."""
        return {"head_dim": module.qkv.in_features // module.num_heads}

    def forward(self: Any, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        shifts = [
            0 if window >= size else shift
            for shift, window, size in zip(self.shift_size, (rows, columns), padded.shape[1:3], strict=True)
        ]
        if any(shifts):
            padded = torch.roll(padded, shifts=(-shifts[0], -shifts[1]), dims=(1, 2))
        across, down = padded.shape[2] // columns, padded.shape[1] // rows
        windows = padded.unflatten(2, (across, columns)).unflatten(1, (down, rows)).transpose(2, 3)
        tokens = windows.flatten(3, 4).flatten(0, 2)
        q, k, v = F.linear(tokens, self.qkv.weight, self._bias()).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shifts):
            mask = self._neighbours(padded, shifts)
            scores = (scores.unflatten(0, (batch, down * across)) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
        out = self.proj((weights @ v).transpose(1, 2).flatten(-2))
        out = F.dropout(out, self.dropout, self.training)
        out = out.unflatten(1, (rows, columns)).unflatten(0, (batch, down, across)).transpose(2, 3)
        out = out.flatten(3, 4).flatten(1, 2)
        if any(shifts):
            out = torch.roll(out, shifts=(shifts[0], shifts[1]), dims=(1, 2))
        return out[:, :height, :width, :].contiguous()

    def _bias(self: Any) -> Tensor | None:
        bias: Tensor | None = self.qkv.bias
        return bias

    def _scores(self: Any, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def _neighbours(self: Any, x: Tensor, shifts: list[int]) -> Tensor:
        """A mask of shape ``[windows, tokens, tokens]``, -100 between pixels that the shift brought together."""
        rows, columns = self.window_size
        region = x.new_zeros(x.shape[1:3])
        for size, window, shift, dim in zip(x.shape[1:3], (rows, columns), shifts, (0, 1), strict=True):
            if shift:
                place = torch.arange(size, device=x.device)
                part = (place >= size - window).to(x.dtype) + (place >= size - shift).to(x.dtype)
            else:
                part = x.new_zeros(size)
            region = region * 3 + (part[:, None] if dim == 0 else part[None, :])
        region = region.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return torch.where(region[:, None, :] == region[:, :, None], 0.0, -100.0).to(x.dtype)


class FlexibleWindowAttention(_FlexibleWindows, ShiftedWindowAttention):
    """``ShiftedWindowAttention`` (Swin) of flexible width."""


class FlexibleWindowAttentionV2(_FlexibleWindows, ShiftedWindowAttentionV2):
    """``ShiftedWindowAttentionV2`` (Swin V2): cosine attention, whose keys have no bias."""

    def _bias(self: Any) -> Tensor | None:
        bias = self.qkv.bias
        if bias is None:
            return None
        q, k, v = bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _scores(self: Any, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=math.log(100.0)).exp()
