"""How large a loss's gradients are beside those of the loss itself: GradScaler and accumulation change their scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossProbe:
    """A zero that is added to each loss; its gradient is what the gradients of one optimizer step are scaled by."""

    def __init__(self) -> None:
        self._zero = torch.zeros((), requires_grad=True)

    def attach(self, evaluator: Any) -> None:
        """Add it to every loss of an evaluator."""
        evaluator.patch_loss(lambda loss, _: loss + self._zero.to(loss))

    def take(self) -> Tensor:
        """The scale since the last time, float32 []; 1 where no backward pass went through a loss."""
        found, self._zero.grad = self._zero.grad, None
        return torch.ones(()) if found is None else found.detach()
