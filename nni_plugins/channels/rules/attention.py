"""Scaled dot-product attention in one operator, as each device has it: heads and their width pass through it."""

from __future__ import annotations

import math

from nni_plugins.channels.call import Call, Contraction, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.elementwise import aligned
from nni_plugins.channels.rules.registry import rule

_SCALE = "scores are scaled by the width of a head"
_HEADS_FIRST = (
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
    "_scaled_dot_product_attention_math_for_mps scaled_dot_product_attention _triton_scaled_dot_attention"
)
_TOKENS_FIRST = "_flash_attention_forward _efficient_attention_forward _cudnn_attention_forward"


@rule(*(f"aten.{name}" for name in _HEADS_FIRST.split()))
def attention(call: Call) -> list[MaybeLabels]:
    """Queries, keys and values ``[..., head, token, width]``."""
    bias = call.tensor(3, "attn_bias") or call.tensor(3, "attn_mask")
    return _attention(call, bias, token=-2)


@rule(*(f"aten.{name}" for name in _TOKENS_FIRST.split()))
def attention_forward(call: Call) -> list[MaybeLabels]:
    """Queries, keys and values ``[batch, token, head, width]``, or ``[token, head, width]``."""
    bias = call.tensor(3, "bias") if "efficient" in call.cause.operator else None
    return _attention(call, bias, token=-3)


def _attention(call: Call, bias: Info | None, token: int) -> list[MaybeLabels]:
    q, k, v = call.inputs[:3]
    rank = len(q.shape)
    token %= rank
    heads = next((dim for dim in (rank - 2, rank - 3) if dim != token and dim >= 0), None)
    grouped = False
    for dim in range(rank - 1):
        if dim == token:
            continue
        call.tie(k.labels[dim], v.labels[dim])
        call.trace.labels.prefer(q.labels[dim])
        if q.shape[dim] == k.shape[dim]:
            call.tie(q.labels[dim], k.labels[dim])
        elif dim == heads and k.shape[dim] > 1:
            grouped = True
            _share(call, q.labels[dim], k.labels[dim], q.shape[dim] // k.shape[dim])
    if call.kwargs.get("scale") is None:
        call.inexact(q.labels[-1], _SCALE)
    call.contract(q, rank - 1, k, rank - 1)
    call.tie(k.labels[token], v.labels[token])
    call.inexact(k.labels[token], "normalised across channels")
    if v.labels[token] is not None:
        call.contractions.append(Contraction(v, token))
    out = [*q.labels[:-1], v.labels[-1]]
    if bias is not None:
        _add(call, out, bias, token, heads, k)
    _cost(call, q, k, v, token)
    call.zero = [z and dim != token and not (grouped and dim == heads) for dim, z in enumerate(v.zeros)]
    for index in range(1, len(call.outputs)):
        shape = call.shape(index)
        if shape == q.shape[:-1]:  # the logarithm of the sum over the keys
            call.give(index, out[:-1])
        elif shape == (*q.shape[:-1], k.shape[token]):  # the weights
            call.give(index, [*out[:-1], k.labels[token]])
    return out


def _share(call: Call, many: MaybeLabels, few: MaybeLabels, each: int) -> None:
    """Heads of queries are the pair (head of keys and values, query of those that share it)."""
    why = call.because("shared with something of fixed size")
    if few is None:
        call.trace.labels.freeze(many, why)
        return
    call.trace.labels.prefer(few)
    call.trace.labels.relate(many, few, call.fresh(each), why)


def _add(call: Call, out: list[MaybeLabels], bias: Info, token: int, heads: int | None, k: Info) -> None:
    """Tie what is added to the scores, ``[..., head, query, key]``, to them."""
    if not bias.shape:
        return
    lead = [labels for dim, labels in enumerate(out[:-1]) if dim != token]
    sizes = [size for dim, size in enumerate(call.shape()[:-1]) if dim != token]
    scores = Info((*sizes, call.shape()[token], k.shape[token]), [*lead, out[token], k.labels[token]], dynamic=True)
    if len(bias.shape) <= len(scores.shape):
        aligned(call, [scores, bias], scores.shape)


def _cost(call: Call, q: Info, k: Info, v: Info, token: int) -> None:
    batch = [labels for dim, labels in enumerate(q.labels[:-1]) if dim != token]
    keys = k.shape[token]
    call.costs(math.prod(q.shape) * keys, *batch, q.labels[token], q.labels[-1], k.labels[token])
    call.costs(math.prod(q.shape[:-1]) * keys * v.shape[-1], *batch, q.labels[token], v.labels[-1], k.labels[token])


@rule("aten._transform_bias_rescale_qkv")
def transform(call: Call) -> list[MaybeLabels]:
    for info in call.inputs:
        for labels in info.labels:
            call.freeze(labels, "queries, keys and values are packed by a fixed number of heads")
    for index in range(1, len(call.outputs)):
        call.give(index, [None] * len(call.shape(index)))
    return [None] * len(call.shape())
