"""Whether a step's numbers are finite: AMP's scaler skips those that are not, and so do the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def all_finite(values: Iterable[Tensor]) -> bool:
    """Say whether tensors of values that are not negative hold no inf and no nan; one answer is waited for, not many.

    Parameters
    ----------
    values : iterable of torch.Tensor
        Squares or absolute values, on any devices.
    """
    by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for peak in torch._foreach_max([value for value in values if value.numel()]):
        by_place.setdefault((peak.device, peak.dtype), []).append(peak)
    return all(math.isfinite(torch.stack(found).amax()) for found in by_place.values())
