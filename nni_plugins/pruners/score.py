"""How important a unit is: the first of the three questions of pruning, in its shared part.

A method measures something for each element of a parameter (its absolute value, its square, the square of
weight times gradient ...). The score of a unit is the sum of that over all that goes with the unit: the
rows of its producers, the elements of its norms, the slices of its consumers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGroup, Member

ROLES = ("out", "scale", "in")
"""Roles that a parameter's dimension plays for a unit: produces it, scales it, consumes it."""


def member_sums(values: Tensor, member: Member) -> Tensor:
    """Sum of elementwise values over what a member gives to each unit.

    Parameters
    ----------
    values : torch.Tensor
        Of the parameter's shape.
    member : Member
        Says along which dimension, and which indices, the units lie.

    Returns
    -------
    torch.Tensor
        Float64 [size], one number for each unit.
    """
    other = [dim for dim in range(values.dim()) if dim != member.dim]
    along = values.sum(dim=other, dtype=torch.float64) if other else values.to(torch.float64)
    return along[torch.as_tensor(member.indices, device=along.device)].sum(dim=1)


def group_sums(group: ChannelGroup, values: Mapping[str, Tensor], roles: Collection[str] = ROLES) -> Tensor | None:
    """Sum of elementwise values over the members of a group.

    Parameters
    ----------
    group : ChannelGroup
        The group, of ``size`` units.
    values : mapping of str to torch.Tensor
        By parameter name (``layer.weight``); members whose parameter is absent are left out.
    roles : collection of {'out', 'scale', 'in'}
        Roles that count.

    Returns
    -------
    torch.Tensor or None
        Float64 [size]; None where no member counts.
    """
    total: Tensor | None = None
    for member in group.members:
        if member.role in roles and member.name in values:
            sums = member_sums(values[member.name], member)
            total = sums if total is None else total + sums.to(total.device)
    return total
