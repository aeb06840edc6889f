"""What the processes of a distributed run agree on, so that all of them have the same masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Named = TypeVar("Named", bound=Mapping[str, Tensor])


def distributed() -> bool:
    """Say whether this is one process of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def averaged_over_ranks(values: Named) -> Named:
    """Average tensors over the processes, in place; every process must have the same names, in the same order."""
    if distributed():
        for value in values.values():
            torch.distributed.all_reduce(value)
            value /= torch.distributed.get_world_size()
    return values


def as_on_rank_zero(value: Any) -> Any:
    """Return what the first process has: for what each would measure by a clock of its own."""
    if not distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]
