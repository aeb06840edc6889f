"""Random numbers in the shape of data: to try a model, its pruning and its export where no data are at hand.

In a recipe: ``data: {name: 'nni_plugins.training.random_data:loaders', arguments: {shape: [3, 32, 32], classes: 10}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset


def loaders(
    shape: Sequence[int], classes: int, dtype: str = "float32", count: int = 256, batch_size: int = 32
) -> tuple[Any, Any, Any]:
    """Return training, validation and test loaders; nothing can be learnt from them.

    Parameters
    ----------
    shape
        Of one input, without the batch.
    classes
        How many there are.
    dtype
        Of the inputs; those of whole numbers are 0 and 1.
    count
        Inputs in each split.
    batch_size
        Inputs in a batch.
    """
    kind = getattr(torch, dtype)

    def split(seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, *shape, generator=generator)
        made = inputs.to(kind) if kind.is_floating_point else (inputs > 0).to(kind)
        return TensorDataset(made, torch.randint(0, classes, (count,), generator=generator))

    return tuple(  # type: ignore[return-value]
        DataLoader(split(seed), batch_size, shuffle=seed == 0, generator=torch.Generator().manual_seed(seed))
        for seed in range(3)
    )
