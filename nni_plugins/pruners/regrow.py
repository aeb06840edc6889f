"""Drop and grow: one update of the masks of dynamic sparse training, on plain tensors.

Active weights of smallest magnitude are dropped, and as many grow where the dense gradient is largest (RigL: Evci et
al., Rigging the Lottery, ICML 2020) or at random (SET: Mocanu et al., Nature Communications 2018). As in RigL's code, a
weight that was dropped is a candidate for growth at once; if it grows, nothing has changed for it. A grown weight
starts at 0 (:func:`start_grown`), with the optimizer's memory of it cleared (:func:`clear_state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nni_plugins.pruners.patterns import Pattern


def drop_fraction(step: int, end_step: int, alpha: float = 0.3) -> float:
    """RigL's cosine ``α/2·(1 + cos(π·t/T_end))``; 0 after the end."""
    return alpha / 2 * (1 + math.cos(math.pi * step / end_step)) if 0 <= step < end_step else 0.0


def drop_and_grow(
    weight: Tensor,
    mask: Tensor,
    gradient: Tensor | None,
    fraction: float,
    generator: torch.Generator | None = None,
    *,
    pattern: Pattern | None = None,
    layout: tuple[int, int] = (1, 1),
    allowed: Tensor | None = None,
) -> Tensor:
    """A layer's next mask, with as many weights as before.

    Parameters
    ----------
    weight : torch.Tensor
        The weight; what is masked of it does not matter.
    mask : torch.Tensor
        Of its shape, 1 where kept.
    gradient : torch.Tensor or None
        Dense gradient, of any scale; None to grow at random.
    fraction : float
        Of the active weights, to drop.
    generator : torch.Generator, optional
        On the CPU, for random growth; torch's own by default.
    pattern : Pattern, optional
        What a block of the pattern loses grows in the same block.
    layout : (int, int)
        For the pattern: the input dimension and its groups, from :func:`~nni_plugins.pruners.patterns.input_layout`.
    allowed : torch.Tensor, optional
        Bool: where weights may grow; everywhere by default. An active weight elsewhere may only be dropped, for one
        that is allowed.

    Returns
    -------
    torch.Tensor
        Of the dtype and device of ``mask``; the inputs are not changed.
    """
    weights, masks = {"": weight}, {"": mask}
    gradients = None if gradient is None else {"": gradient}
    return drop_and_grow_all(
        weights, masks, gradients, fraction, generator,
        patterns={} if pattern is None else {"": pattern}, layouts={"": layout},
        allowed={} if allowed is None else {"": allowed},
    )[""]  # fmt: skip


def drop_and_grow_all(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None,
    fraction: float,
    generator: torch.Generator | None = None,
    *,
    patterns: Mapping[str, Pattern] | None = None,
    layouts: Mapping[str, tuple[int, int]] | None = None,
    allowed: Mapping[str, Tensor] | None = None,
    bounds: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Tensor]:
    """Next masks of several layers, ranked together: weights move to layers that need them; the total stays.

    Parameters
    ----------
    weights, masks, gradients, allowed : mapping of str to torch.Tensor
        As for :func:`drop_and_grow`, by layer.
    fraction : float
        Of all active weights, to drop.
    generator : torch.Generator, optional
        As for :func:`drop_and_grow`.
    patterns, layouts : mapping, optional
        Of the layers that have a pattern; such a layer regrows within its blocks, so its density stays.
    bounds : mapping of str to (int, int), optional
        Least and greatest number of active weights in a layer; by default at least 1.

    Returns
    -------
    dict of str to torch.Tensor
        By layer.
    """
    active = {name: (mask != 0).flatten() for name, mask in masks.items()}
    count = round(fraction * sum(int(flat.sum()) for flat in active.values()))
    if count == 0:
        return {name: mask.clone() for name, mask in masks.items()}
    draws = gradients or {
        name: torch.rand(mask.shape, generator=generator).to(mask.device) for name, mask in masks.items()
    }
    limits = bounds or {}
    sizes = {name: int(flat.sum()) for name, flat in active.items()}
    least = {name: min(limits.get(name, (1, 0))[0], sizes[name]) for name in active}
    magnitude = {name: weights[name].detach().flatten().abs().float() for name in active}
    dropped = _best(
        {name: -magnitude[name] for name in active}, active, count, {n: sizes[n] - least[n] for n in active}
    )
    kept = {name: active[name] & ~dropped[name] for name in active}
    free = {name: ~kept[name] & _where(allowed, name, kept[name]) for name in active}
    score = {name: draws[name].detach().flatten().abs().float() for name in active}
    grown = {}
    blocked = [name for name in active if name in (patterns or {})]
    for name in blocked:
        pattern, layout = (patterns or {})[name], (layouts or {}).get(name, (1, 1))
        grown[name] = _grow_in_blocks(pattern, layout, masks[name].shape, score[name], free[name], dropped[name])
    others = [name for name in active if name not in grown]
    room = {n: max(limits.get(n, (0, len(active[n])))[1], sizes[n]) - int(kept[n].sum()) for n in others}
    lost = sum(int(dropped[name].sum()) for name in others)
    grown |= _best({n: score[n] for n in others}, {n: free[n] for n in others}, lost, room)
    result = {}
    for name, mask in masks.items():
        new = kept[name] | grown[name]
        short = sizes[name] - int(new.sum()) if len(masks) == 1 or name in blocked else 0
        if short > 0:  # nowhere to grow: what was dropped comes back, the largest first
            new |= _best({name: magnitude[name]}, {name: dropped[name] & ~new}, short, {name: short})[name]
        result[name] = new.view(mask.shape).to(mask.dtype)
    return result


def _best(
    scores: Mapping[str, Tensor], candidates: Mapping[str, Tensor], count: int, limits: Mapping[str, int]
) -> dict[str, Tensor]:
    """The ``count`` candidates of highest score over all layers, at most ``limits`` in each: bool, flat, by layer."""
    found = {}
    for name, flat in candidates.items():
        found[name] = flat.clone()
        if limits[name] < int(flat.sum()):
            found[name][flat] = top(scores[name][flat], limits[name])
    if len(found) == 1 and sum(limits.values()) <= count:
        return found
    values = {name: scores[name][flat] for name, flat in found.items()}
    device = next((v.device for v in values.values()), None)
    chosen = top(torch.cat([torch.empty(0, device=device), *(v.to(device) for v in values.values())]), count)
    for (name, flat), here in zip(found.items(), chosen.split([len(v) for v in values.values()]), strict=True):
        found[name][flat.clone()] = here.to(flat.device)
    return found


def top(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of some values are: bool; of equal ones the first. Takes linear time."""
    if count >= len(values) or count <= 0:
        return torch.full_like(values, count > 0, dtype=torch.bool)
    least = values.kthvalue(len(values) - count + 1).values
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def _grow_in_blocks(
    pattern: Pattern, layout: tuple[int, int], shape: torch.Size, score: Tensor, free: Tensor, dropped: Tensor
) -> Tensor:
    """In each block of the pattern, the best free places, as many as the block has lost: bool, flat."""
    values = torch.where(free, score, -torch.inf).view(shape)
    blocks = pattern.blocks(values, *layout, fill=-torch.inf)
    lost = pattern.blocks(dropped.view(shape).to(torch.int64), *layout).sum(dim=1, keepdim=True)
    rank = blocks.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return pattern.restore((rank < lost) & (blocks > -torch.inf), values, *layout).flatten()


def _where(allowed: Mapping[str, Tensor] | None, name: str, like: Tensor) -> Tensor:
    if allowed is None or name not in allowed:
        return torch.ones_like(like)
    return allowed[name].flatten() != 0


@torch.no_grad()
def start_grown(weight: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Set weights that were masked and are not now to 0, in place; return where they are (bool)."""
    grown = (new != 0) & (old == 0)
    weight.data.masked_fill_(grown, 0.0)
    return grown


@torch.no_grad()
def clear_state(optimizer: torch.optim.Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Clear the optimizer's memory of some entries of a parameter, in place.

    Every tensor of the parameter's shape counts, whatever the optimizer calls it (momentum, ``exp_avg``, ``square_avg``
    ...); what is kept for the whole parameter, such as the number of steps, stays. A master copy of a weight that is
    held at another precision is of its shape too, and a grown weight is 0 there as well.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where.to(value.device), 0)
