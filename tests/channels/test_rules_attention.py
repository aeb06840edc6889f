"""Attention in all its forms: heads go, wherever they are cut out, and half of them gone equals half of them masked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph
from nni_plugins.channels.trace import Trace
from tests.channels.rules_proof import Beside, Call, prove

X = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Queries, keys and values from one layer, and what is done with them."""

    def __init__(self, attend, heads=4, biased=False, normed=False, looks=False):
        super().__init__()
        self.heads, self.width, self.attend, self.looks = heads, 16 // heads, attend, looks
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, heads)) if biased else None
        self.register_buffer("places", torch.arange(36).reshape(6, 6) % 9)
        self.norm = nn.LayerNorm(self.width) if normed else nn.Identity()

    def forward(self, x):
        if self.looks and x.sum() > 1e9:  # a forward that looks at values runs on real data, with a device's own kernel
            return x
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = None
        if self.table is not None:
            bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        out = self.attend(self.norm(q), self.norm(k), v, bias)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, self.heads * self.width))


def fused(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.4)


def by_width(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def by_hand(q, k, v, bias):
    scores = 0.4 * q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def by_einsum(q, k, v, bias):
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return torch.einsum("bhij,bhjd->bhid", (scores if bias is None else scores + bias).softmax(-1), v)


def across_channels(q, k, v, bias):
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
    return ((q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


def linear(q, k, v, bias):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def cosine(q, k, v, bias):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("attend", [fused, by_width, by_hand, by_einsum])
def test_heads(attend, biased, looks):
    prove(Beside(Fused(attend, biased=biased, looks=looks)), X, {"first": 16, "body.qkv": 4})


@pytest.mark.parametrize("attend", [across_channels, linear, cosine])
def test_heads_of_other_kinds_of_attention(attend):
    prove(Beside(Fused(attend)), X, {"first": 16, "body.qkv": 4})


def test_heads_with_norms_of_queries_and_keys():
    prove(Beside(Fused(fused, normed=True)), X, {"first": 16, "body.qkv": 4})


class Shared(nn.Module):
    """Four heads of queries, and fewer of keys and values."""

    def __init__(self, share, heads=2, looks=False):
        super().__init__()
        self.share, self.looks, self.each = share, looks, 4 // heads
        self.q, self.o = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.k, self.v = nn.Linear(16, 4 * heads, bias=False), nn.Linear(16, 4 * heads, bias=False)

    def forward(self, x):
        if self.looks and x.sum() > 1e9:
            return x
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.share is not None:
            k, v = self.share(k, self.each), self.share(v, self.each)
        own = {} if self.share is not None else {"enable_gqa": True}
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, **own)
        return self.o(out.transpose(1, 2).flatten(2))


def repeated(x, each):
    return x.repeat_interleave(each, 1)


def expanded(x, each):
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, each, tokens, width).reshape(batch, heads * each, tokens, width)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("share", [repeated, expanded, None])
def test_heads_of_keys_go_with_the_queries_that_share_them(share, looks):
    if share is None and "enable_gqa" not in str(F.scaled_dot_product_attention.__doc__):
        pytest.skip("this torch has no enable_gqa")
    if share is repeated and torch.__version__ < "2.5":
        pytest.skip("this torch repeats by an index")
    graph = prove(Beside(Shared(share, looks=looks)), X, {"first": 16, "body.q": 2})
    group = graph.group("body.q")
    assert group.kind == "heads"
    assert {(m.name, m.indices.shape[1]) for m in group.members} == {
        ("body.q.weight", 8), ("body.k.weight", 4), ("body.v.weight", 4), ("body.o.weight", 8)
    }  # fmt: skip


def test_heads_that_share_one_key_leave_something_when_their_query_is_masked():
    prove(Beside(Shared(expanded, heads=1)), X, {"first": 16, "body.q": 4}, stays=["body.q"])


MODULES = {
    "MultiheadAttention": (
        lambda: Call(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(16, 4, batch_first=True)),
        {"first": 16, "body.a": 4},
    ),
    "MultiheadAttention with keys and values of their own widths": (
        lambda: Call(
            lambda m, x: m.a(x, m.k(x), m.k(x), need_weights=False)[0],
            k=nn.Linear(16, 10),
            a=nn.MultiheadAttention(16, 4, batch_first=True, kdim=10, vdim=10),
        ),
        {"first": 16, "body.k": 10, "body.a": 4},
    ),
    "gated, packed": (
        lambda: Call(
            lambda m, x: m.down(F.silu(m.up(x).chunk(2, -1)[0]) * m.up(x).chunk(2, -1)[1]),
            up=nn.Linear(16, 24),
            down=nn.Linear(12, 16),
        ),
        {"first": 16, "body.up": 12},
    ),
    "gated, apart": (
        lambda: Call(
            lambda m, x: m.down(F.gelu(m.gate(x)) * m.up(x)),
            gate=nn.Linear(16, 12),
            up=nn.Linear(16, 12),
            down=nn.Linear(12, 16),
        ),
        {"first": 16, "body.gate": 12},
    ),
    "glu": (
        lambda: Call(lambda m, x: m.down(F.glu(m.up(x))), up=nn.Linear(16, 24), down=nn.Linear(12, 16)),
        {"first": 16, "body.up": 12},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    body, expected = MODULES[name]
    prove(Beside(body()), X, expected)


def test_rotated_queries_keep_their_width_and_lose_heads():
    class Rotary(Fused):
        def forward(self, x):
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)

            def turn(t):
                pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
                return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

            self.attend = lambda q, k, v, bias: by_hand(turn(q), turn(k), v, bias)
            return super().forward(x)

    prove(Beside(Rotary(None)), X, {"first": 16, "body.qkv": 4})


OPERATORS = {
    "_scaled_dot_product_flash_attention_for_cpu": (),
    "_scaled_dot_product_attention_math": (),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_says_the_same(name):
    operator = getattr(torch.ops.aten, name)

    def attend(q, k, v, bias):
        return operator(q, k, v, scale=0.4)[0]

    graph = prove(Beside(Fused(attend, looks="cpu" in name)), X, {"first": 16, "body.qkv": 4})
    assert any(name.removesuffix("_math") in op.name or op.name == "aten.bmm" for op in graph.trace.operators)


def test_attention_in_one_operator_costs_what_its_products_cost():
    def macs(attend, looks):
        return ChannelGraph.watch(Beside(Fused(attend, looks=looks)), X).cost().macs

    assert macs(fused, looks=True) == macs(fused, looks=False) == macs(by_hand, looks=False)


def test_a_width_that_scales_the_scores_is_not_exact():
    def graph_of(attend):
        trace = Trace.record(Fused(attend, heads=4, looks=True), torch.randn(2, 6, 16))
        return [op for op in trace.operators if "attention" in op.name], trace

    operators, trace = graph_of(by_width)
    given, other = graph_of(fused)
    assert len(operators) == len(given) == 1
    assert trace.labels.inexact_count == other.labels.inexact_count + 1
