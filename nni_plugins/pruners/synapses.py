"""Synapses: the kernels of layers, one for each pair of a row and an input, and what the death of some entails.

Where all that reads a unit is dead, or all that makes it, the unit is dead, and takes its other synapses along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import ChannelGroup, Member


@dataclass(frozen=True)
class Layout:
    """How a weight is a table of kernels: its first two dimensions, the others being the kernel's.

    Parameters
    ----------
    shape : tuple of int
        Of the weight.
    groups : int
        Of a grouped convolution.
    transposed : bool
        Inputs come first, as in transposed convolutions.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module, weight: Tensor) -> Layout:
        """The layout of a module's weight."""
        groups = getattr(module, "groups", 1) if isinstance(module, nn.modules.conv._ConvNd) else 1
        return cls(tuple(weight.shape), groups, bool(getattr(module, "transposed", False)))

    @property
    def depthwise(self) -> bool:
        """Whether each input channel has kernels of its own, so that a dead one cuts its channel."""
        return self.groups > 1 and self.shape[1 - int(self.transposed)] == 1

    @property
    def kernel_size(self) -> int:
        """Weights of a synapse."""
        return int(torch.Size(self.shape[2:]).numel())

    def norms(self, weight: Tensor) -> Tensor:
        """L2 norm of each kernel: [rows, inputs]."""
        return weight.flatten(2).norm(dim=2) if weight.dim() > 2 else weight.abs()

    def of_inputs(self, values: Tensor) -> Tensor:
        """Values of the layer's input channels, as a table."""
        rows, columns = self.shape[:2]
        if self.transposed:
            return values[:, None].expand(rows, columns)
        per_group = values.view(self.groups, 1, columns)
        return per_group.expand(self.groups, rows // self.groups, columns).reshape(rows, columns)

    def rows_alive(self, table: Tensor) -> Tensor:
        """Whether each of the layer's output channels has a live synapse: bool."""
        return table.view(self.groups, -1, table.shape[1]).any(1).flatten() if self.transposed else table.any(1)

    def row_norms(self, table: Tensor) -> Tensor:
        """L2 norm of each row over its inputs, as wide as the table."""
        if not self.transposed:
            return table.norm(dim=1, keepdim=True).expand_as(table)
        inputs = table.view(self.groups, -1, table.shape[1])
        return inputs.norm(dim=1, keepdim=True).expand_as(inputs).reshape_as(table)

    def wide(self, table: Tensor) -> Tensor:
        """A table as wide as the weight."""
        return table.view(*table.shape, *[1] * (len(self.shape) - 2)).expand(self.shape)


class Synapse:
    """The trained form of a layer's weight K: s·K/‖K‖, kernel by kernel; see :func:`synaptic_mul`."""

    def __init__(self, layout: Layout, strength: Tensor):
        self.layout, self.strength = layout, strength.detach().clone().requires_grad_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Synapse:
        return self  # an average of the weights (EMA) runs with the strengths as they are now

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight with these strengths."""
        if self.strength.device != weight.device:
            self.strength.data = self.strength.data.to(weight.device)
        return _Rescaled.apply(weight, self.strength)


class _Rescaled(torch.autograd.Function):
    """s·K/‖K‖ for each kernel K, with a gradient of six operators; autograd's own takes three times as many."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, strength: Tensor) -> Tensor:
        norms = _norms(weight)
        factor = _wide(strength.to(weight.dtype) / norms, weight)
        ctx.save_for_backward(weight, strength, norms, factor)
        return weight * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, strength, norms, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            norms = _norms(weight)
            factor = _wide(strength.to(weight.dtype) / norms, weight)
        along = _sums(gradient, weight) / norms  # of the gradient by s
        back = torch.addcmul(gradient, weight, _wide(along / norms, weight), value=-1) * factor
        return back, along.to(strength.dtype)


def _norms(weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        norms = weight.abs()
    elif weight.dtype in (torch.float32, torch.float64):
        # a product of matrices; on a CPU, vector_norm takes twice as long for kernels as small as these
        squares = (weight * weight).reshape(-1, weight[0, 0].numel())
        norms = squares.mv(squares.new_ones(squares.shape[1])).sqrt().view(weight.shape[:2])
    else:
        norms = torch.linalg.vector_norm(weight, dim=list(range(2, weight.dim())))
    return norms.clamp_min(torch.finfo(weight.dtype).tiny ** 0.5)


def _sums(first: Tensor, second: Tensor) -> Tensor:
    """The product of two weights, summed over each kernel."""
    if first.dim() == 2:
        return first * second
    size = first[0, 0].numel()
    return first.reshape(-1, 1, size).bmm(second.reshape(-1, size, 1)).view(first.shape[:2])


def _wide(table: Tensor, weight: Tensor) -> Tensor:
    return table.view(*table.shape, *[1] * (weight.dim() - 2))


@dataclass
class Unit:
    """A group whose units can be removed: the tables that they are rows or columns of.

    ``makers`` and ``readers`` are the tables by parameter name; where ``all_known`` is false for one of them, something
    else makes or reads the units too. ``cuts`` are depthwise tables, any dead kernel of which cuts the unit.
    """

    group: ChannelGroup
    makers: list[Member] = field(default_factory=list)
    cuts: list[Member] = field(default_factory=list)
    readers: list[Member] = field(default_factory=list)
    all_makers: bool = True
    all_readers: bool = True

    @classmethod
    def of(cls, group: ChannelGroup, layouts: Mapping[str, Layout], is_buffer: Mapping[str, bool]) -> Unit:
        """Sort a group's members."""
        unit = cls(group)
        for member in group.members:
            if is_buffer[member.name] or member.role == "scale" or member.parameter.endswith("bias"):
                continue
            layout = layouts.get(member.name)
            if layout is not None and layout.depthwise and member.dim == 0:
                unit.cuts.append(member)
            elif member.role == "in":
                unit.all_readers &= layout is not None
                unit.readers += [member] * (layout is not None)
            else:
                unit.all_makers &= layout is not None
                unit.makers += [member] * (layout is not None)
        return unit

    @property
    def members(self) -> list[Member]:
        """All tables' members."""
        return [*self.makers, *self.cuts, *self.readers]

    def dead(self, alive: Mapping[str, Tensor]) -> Tensor:
        """Bool [size]: the units that no live synapse makes, or none reads."""
        gone = torch.zeros(self.group.size, dtype=torch.bool)
        for members, known in ((self.makers, self.all_makers), (self.readers, self.all_readers)):
            if known and members:
                gone |= ~torch.stack([lives(alive[m.name], m) for m in members]).any(0)
        for member in self.cuts:
            gone |= ~lives(alive[member.name], member)
        return gone


def lives(table: Tensor, member: Member) -> Tensor:
    """Bool [size]: whether a unit has a live synapse in a table."""
    return table.movedim(member.dim, 0).any(1)[torch.as_tensor(member.indices)].any(1)


@dataclass(frozen=True)
class Link:
    """A layer, all of whose input comes through norms from layers that are known, whatever else these go to.

    Parameters
    ----------
    reader, layout
        The layer's weight, and its layout.
    makers : sequence of (str, Layout, torch.Tensor)
        The weights that make its input, and for each input channel which of their rows does, or −1.
    """

    reader: str
    layout: Layout
    makers: Sequence[tuple[str, Layout, Tensor]]

    def fed(self, alive: Mapping[str, Tensor]) -> Tensor:
        """The reader's synapses that read something, as a table."""
        fed = torch.zeros(len(self.makers[0][2]), dtype=torch.bool)
        for name, layout, rows in self.makers:
            fed |= layout.rows_alive(alive[name])[rows.clamp_min(0)] & (rows >= 0)
        return self.layout.of_inputs(fed)


def spread(
    alive: Mapping[str, Tensor], units: Sequence[Unit], links: Sequence[Link] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Let what is cut off die, until nothing more does.

    Returns
    -------
    alive : dict of str to torch.Tensor
        Bool tables, by parameter name.
    dead : dict of str to torch.Tensor
        Bool [size] of each group that loses units.
    """
    alive = {name: table.clone() for name, table in alive.items()}
    dead = {unit.group.name: torch.zeros(unit.group.size, dtype=torch.bool) for unit in units}
    changed = True
    while changed:
        changed = False
        for link in links:
            fed = alive[link.reader] & link.fed(alive)
            changed |= not torch.equal(fed, alive[link.reader])
            alive[link.reader] = fed
        for unit in units:
            gone = unit.dead(alive)
            new = gone & ~dead[unit.group.name]
            if new.any():
                changed = True
                dead[unit.group.name] |= new
                for member in unit.members:
                    places = torch.as_tensor(member.indices)[new].flatten()
                    alive[member.name].index_fill_(member.dim, places, False)
    return alive, {name: gone for name, gone in dead.items() if gone.any()}


def lifeline(values: Mapping[str, Tensor], units: Sequence[Unit]) -> dict[str, Tensor]:
    """Synapses that must stay, so that no layer is cut through: one unit of each group, and what ties these together.

    Parameters
    ----------
    values : mapping of str to torch.Tensor
        Strengths; those of dead synapses are negative.
    """
    chosen: dict[tuple[str, int], list[Tensor]] = {}
    for unit in units:
        total = torch.zeros(unit.group.size, dtype=torch.float64)
        for member in unit.members:
            along = values[member.name].clamp_min(0).movedim(member.dim, 0).sum(1, dtype=torch.float64)
            total += along[torch.as_tensor(member.indices)].sum(1) / along.sum().clamp_min(1e-30)
        gone = unit.dead({name: table >= 0 for name, table in values.items()})
        best = int(total.masked_fill(gone, -1.0).argmax())
        for member in unit.members:
            chosen.setdefault((member.name, member.dim), []).append(torch.as_tensor(member.indices)[best])
    kept = {}
    for name, table in values.items():
        keep = torch.zeros_like(table, dtype=torch.bool)
        everything = [[torch.arange(size)] for size in table.shape]
        for first in chosen.get((name, 0), everything[0]):
            for second in chosen.get((name, 1), everything[1]):
                part = table[first][:, second]
                row, column = divmod(int(part.argmax()), part.shape[1])
                keep[first[row], second[column]] = True
        kept[name] = keep
    return kept


def weakest(
    values: Mapping[str, Tensor],
    costs: Mapping[str, float],
    units: Sequence[Unit],
    links: Sequence[Link],
    others: Mapping[str, Tensor],
    *,
    budget: float,
    near: float,
    sure: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Which synapses stay when the weakest go until ``budget`` of the cost is gone, what they cut off included.

    Parameters
    ----------
    values : mapping of str to torch.Tensor
        Comparable strengths of the tables that share the budget; −1 where dead already.
    costs : mapping of str to float
        What a synapse of each table costs.
    units, links
        All groups and layers.
    others : mapping of str to torch.Tensor
        Bool: the tables that do not take part, as they are.
    budget, near : float
        Cost to remove, and by how much it may be missed.
    sure : mapping of str to torch.Tensor
        Bool: synapses that stay in any case.

    Returns
    -------
    dict of str to torch.Tensor
        Bool tables of all, before what is cut off has died.
    """
    names = list(values)
    flat = torch.cat([values[name].flatten() for name in names]).clone()
    flat[torch.cat([sure[name].flatten() for name in names])] = torch.inf
    order = flat.argsort(stable=True)
    order = order[: int((flat < torch.inf).sum())]
    sizes = [values[name].numel() for name in names]
    first = int((flat < 0).sum())

    def state(count: int) -> dict[str, Tensor]:
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[order[:count]] = False
        tables = {n: t.view_as(values[n]) for n, t in zip(names, keep.split(sizes), strict=True)}
        return {**others, **tables}

    def removed(count: int) -> float:
        alive = spread(state(count), units, links)[0]
        return sum(float((~alive[name]).sum()) * costs[name] for name in names)

    most = bisect(removed, first, len(order), budget)
    for _ in range(16):  # a synapse whose death would cut off too much stays
        if most >= len(order) or budget - removed(most) <= near:
            break
        order = torch.cat([order[:most], order[most + 1 :]])
        most = bisect(removed, most, len(order), budget)
    if most < len(order) and abs(removed(most + 1) - budget) < budget - removed(most):
        most += 1
    return state(most)


def bisect(cost: Callable[[int], float], low: int, high: int, budget: float) -> int:
    """The largest count whose cost is within the budget, of a cost that does not fall; ``low`` where none is."""
    if cost(high) <= budget * (1 + 1e-12):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget * (1 + 1e-12) else (low, middle)
    return low
