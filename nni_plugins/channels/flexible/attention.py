"""``nn.MultiheadAttention`` with any number of heads and any width of a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FlexibleMultiheadAttention(nn.MultiheadAttention):
    """What ``nn.MultiheadAttention`` computes, with widths read from the weights.

    Arguments, shapes and results are those of ``nn.MultiheadAttention.forward``. Scores are scaled by the width that a
    head had when the module was made, so that a head may lose dimensions and the others still count the same.
    """

    # torch's fused inference path takes embed_dim for the width of all heads together; this keeps it away
    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint on attn_mask, which is needed with it")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask)
        scale = self.head_dim**-0.5
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout, training=True) if dropout > 0 else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Join both masks into one to be added to the scores, of shape ``[batch or 1, heads or 1, L or 1, S]``."""
        added = k.shape[-2]
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (q.shape[0], self.num_heads)))
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, q)[:, None, None, :])
        masks = [F.pad(mask, (0, added - mask.shape[-1])) if mask.shape[-1] < added else mask for mask in masks]
        if not masks:
            return None
        return masks[0] if len(masks) == 1 else masks[0] + masks[1]


class FlexibleTransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` without nested tensors, which its layers' flexible attention does not take."""

    use_nested_tensor = property(lambda self: False, lambda self, value: None)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to be added to scores: a bool mask is True where attention is not allowed."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
