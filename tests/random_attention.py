"""Parts of random networks: attention in the ways in which it is written, and what stands beside it in transformers."""

from __future__ import annotations

import math
import random

import torch
from torch import nn
from torch.nn import functional


class HandRMS(nn.Module):
    """A norm over the last dimension as language models write it themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class BatchLast(nn.Module):
    """A batch norm over the last dimension of tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def token_norm(rng: random.Random, dim: int) -> nn.Module:
    return rng.choice([nn.LayerNorm, nn.LayerNorm, nn.RMSNorm, HandRMS, BatchLast, lambda d: nn.Identity()])(dim)


def _rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Attention written out: how it projects, cuts into heads, scores, and joins again is drawn."""

    def __init__(self, rng: random.Random, dim: int, tokens: int, *, memory: int | None = None) -> None:
        super().__init__()
        self.heads = rng.choice([2, 3, 4, 5])
        self.width = rng.choice([2, 4, 6])
        self.kv_heads = rng.choice([h for h in range(1, self.heads + 1) if self.heads % h == 0] + [self.heads] * 2)
        self.inner = self.heads * self.width
        self.kv_inner = self.kv_heads * self.width
        bias = rng.random() < 0.5
        fused = ["chunk", "split", "three", "unbind"] if self.kv_heads == self.heads and memory is None else []
        self.how = rng.choice(["apart", "kv", *fused])
        if self.how == "apart":
            self.q = nn.Linear(dim, self.inner, bias)
            self.k = nn.Linear(memory or dim, self.kv_inner, bias)
            self.v = nn.Linear(memory or dim, self.kv_inner, bias)
        elif self.how == "kv":
            self.q = nn.Linear(dim, self.inner, bias)
            self.kv = nn.Linear(memory or dim, 2 * self.kv_inner, bias)
        else:
            self.qkv = nn.Linear(dim, 3 * self.inner, bias)
        self.cut = rng.choice(["heads", "width", "both"])
        self.score = rng.choice(["sdpa", "sdpa_scale", "matmul", "scale_q", "bmm", "einsum"])
        self.scale = self.width**-0.5
        self.causal = rng.random() < 0.3
        self.join = rng.choice(["flatten", "minus", "attribute"])
        self.normed = rng.random() < 0.15
        if self.normed:
            self.q_norm, self.k_norm = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.rotary = rng.random() < 0.2 and memory is None
        if self.rotary:
            angle = torch.arange(tokens)[:, None] / 10.0 ** torch.arange(self.width // 2)
            self.register_buffer("cos", torch.cat([angle.cos()] * 2, dim=-1), persistent=False)
            self.register_buffer("sin", torch.cat([angle.sin()] * 2, dim=-1), persistent=False)
        self.table = None
        if rng.random() < 0.2 and memory is None:
            self.table = nn.Parameter(torch.randn(self.heads, tokens, tokens))
        self.out = nn.Linear(self.inner, dim, rng.random() < 0.5)

    def _heads_of(self, x, heads: int):
        batch, tokens, _ = x.shape
        shape = {"heads": (heads, -1), "width": (-1, self.width), "both": (heads, self.width)}[self.cut]
        return x.view(batch, tokens, *shape).transpose(1, 2)

    def _projected(self, x, memory):
        if self.how in ("three", "unbind"):
            batch, tokens, _ = x.shape
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            return qkv.unbind(0) if self.how == "unbind" else (qkv[0], qkv[1], qkv[2])
        if self.how == "apart":
            q, k, v = self.q(x), self.k(memory), self.v(memory)
        elif self.how == "kv":
            q = self.q(x)
            k, v = self.kv(memory).chunk(2, dim=-1)
        elif self.how == "chunk":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.qkv(x).split(self.inner, dim=-1)
        return self._heads_of(q, self.heads), self._heads_of(k, self.kv_heads), self._heads_of(v, self.kv_heads)

    def forward(self, x, memory=None):
        q, k, v = self._projected(x, x if memory is None else memory)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = _rotate(q, self.cos, self.sin), _rotate(k, self.cos, self.sin)
        if self.kv_heads != self.heads:
            times = self.heads // self.kv_heads
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        y = self._attend(q, k, v).transpose(1, 2)
        batch, tokens = y.shape[:2]
        if self.join == "flatten":
            y = y.flatten(2)
        else:
            y = y.reshape(batch, tokens, -1 if self.join == "minus" else self.inner)
        return self.out(y)

    def _attend(self, q, k, v):
        if self.score.startswith("sdpa") and (self.table is None or not self.causal):
            scale = self.scale if self.score == "sdpa_scale" else None
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=self.table, is_causal=self.causal and self.table is None, scale=scale
            )
        if self.score == "scale_q":
            scores = (q * self.scale) @ k.transpose(-2, -1)
        elif self.score == "bmm":
            batch, heads, tokens, width = q.shape
            scores = torch.bmm(
                q.reshape(batch * heads, tokens, width), k.reshape(batch * heads, -1, width).transpose(1, 2)
            )
            scores = scores.view(batch, heads, tokens, -1) * self.scale
        elif self.score == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
        if self.table is not None:
            scores = scores + self.table
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v) if self.score == "einsum" else weights @ v


class Packed(nn.Module):
    """``nn.MultiheadAttention``, with the batch first or not."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        self.first = rng.random() < 0.5
        heads = rng.choice([h for h in (1, 2, 3, 4) if dim % h == 0])
        self.attention = nn.MultiheadAttention(dim, heads, bias=rng.random() < 0.7, batch_first=self.first)
        self.need = rng.random() < 0.3

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=self.need)[0]
        return y if self.first else y.transpose(0, 1)


class Queries(nn.Module):
    """Learnt queries look at the tokens, and the tokens look back at them."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        other = rng.choice([6, 8])
        self.queries = nn.Parameter(torch.randn(1, 3, other))
        self.read = Attention(rng, other, 3, memory=dim)
        self.write = Attention(rng, dim, tokens, memory=other)

    def forward(self, x):
        return self.write(x, self.read(self.queries.expand(len(x), -1, -1), x))


class Mlp(nn.Module):
    """Two linear layers, gated or not."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        hidden = rng.choice([6, 8, 12])
        self.kind = rng.choice(["gelu", "relu", "swiglu", "geglu", "glu", "squared"])
        gated = self.kind in ("geglu", "glu")
        self.up = nn.Linear(dim, 2 * hidden if gated else hidden)
        self.gate = nn.Linear(dim, hidden, bias=False) if self.kind == "swiglu" else None
        self.norm = nn.LayerNorm(hidden) if rng.random() < 0.1 else nn.Identity()
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x):
        y = self.up(x)
        if self.kind == "swiglu":
            y = functional.silu(self.gate(x)) * y
        elif self.kind == "geglu":
            value, gate = y.chunk(2, dim=-1)
            y = value * functional.gelu(gate)
        elif self.kind == "glu":
            y = functional.glu(y)
        else:
            y = {"gelu": functional.gelu, "relu": functional.relu, "squared": lambda t: functional.relu(t) ** 2}[
                self.kind
            ](y)
        return self.down(self.drop(self.norm(y)))


class Mixer(nn.Module):
    """Linear layers across the tokens."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        self.mlp = Mlp(rng, tokens, dim)

    def forward(self, x):
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class Along(nn.Module):
    """Convolutions along the tokens, as in Conformers: pointwise and gated, depthwise, normed, pointwise."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        hidden = rng.choice([6, 8])
        self.up = nn.Conv1d(dim, 2 * hidden, 1)
        self.depth = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = rng.choice(
            [nn.BatchNorm1d(hidden), nn.GroupNorm(2, hidden), nn.InstanceNorm1d(hidden, affine=True)]
        )
        self.down = nn.Conv1d(hidden, dim, 1)

    def forward(self, x):
        y = functional.glu(self.up(x.transpose(1, 2)), dim=1)
        return self.down(functional.silu(self.norm(self.depth(y)))).transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        both = rng.random() < 0.3
        self.layer = rng.choice([nn.LSTM, nn.GRU, nn.RNN])(dim, 5, batch_first=True, bidirectional=both)
        self.out = nn.Linear(10 if both else 5, dim)

    def forward(self, x):
        return self.out(self.layer(x)[0])


class Halves(nn.Module):
    """One part of the width goes through a layer, another stays: split, and put together again."""

    def __init__(self, rng: random.Random, dim: int, tokens: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 12)
        self.sizes = rng.choice([[6, 6], [4, 8], [4, 4, 4]])
        self.inner = Mlp(rng, self.sizes[0], tokens)
        self.by_chunk = len(set(self.sizes)) == 1 and rng.random() < 0.5
        self.down = nn.Linear(12, dim)

    def forward(self, x):
        y = functional.gelu(self.up(x))
        first, *rest = y.chunk(len(self.sizes), dim=-1) if self.by_chunk else y.split(self.sizes, dim=-1)
        return self.down(torch.cat([self.inner(first), *rest], dim=-1))


PARTS = [Attention, Attention, Attention, Attention, Packed, Packed, Queries, Mlp, Mlp, Mixer, Along, Halves]


class Sublayer(nn.Module):
    """A residual around one part: norm before or after, scaled by a LayerScale or not, called twice now and then."""

    def __init__(self, rng: random.Random, dim: int, tokens: int, kind: type[nn.Module] | None = None) -> None:
        super().__init__()
        kind = kind or (Recurrent if rng.random() < 0.05 else rng.choice(PARTS))
        self.part = kind(rng, dim, tokens)
        self.norm = token_norm(rng, dim)
        self.before = rng.random() < 0.7
        self.scale = nn.Parameter(torch.rand(dim) + 0.5) if rng.random() < 0.3 else None
        self.times = 2 if rng.random() < 0.12 else 1

    def forward(self, x):
        for _ in range(self.times):
            y = self.part(self.norm(x) if self.before else x)
            y = y if self.scale is None else y * self.scale
            x = x + y if self.before else self.norm(x + y)
        return x
