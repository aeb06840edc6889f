"""Gradient times weight: the weights go without which the loss would change least, to first order.

Mozer and Smolensky, Skeletonization, NeurIPS 1988; Molchanov et al., Importance Estimation, CVPR 2019; at the start of
training it is SNIP (Lee et al., ICLR 2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.config import check_whole
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.finite import all_finite
from nni_plugins.pruners.schedule import Schedule, as_schedule
from nni_plugins.pruners.weights import WeightPruner


class GradientWeightPruner(WeightPruner):
    """Mask the weights of smallest ``|w·dL/dw|``, averaged over optimizer steps.

    The gradient is what the optimizer's step has used: of all backward passes of the step, unscaled under a GradScaler,
    averaged over processes. Steps that a scaler skips do not count. The gradient of a masked weight is zero, so it
    stays masked.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's.
    evaluator : nni Evaluator
        Its training is what the gradients are read from; it changes the weights, as any training does.
    training_steps : int
        Optimizer steps that a score is averaged over.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    schedule : Schedule, str or dict, optional
        One shot after ``training_steps`` by default.
    **kwargs
        Those of :class:`~nni_plugins.pruners.weights.WeightPruner`.
    """

    needs_training = True
    _kept_state = ("_sums", "_count")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any,
        training_steps: int = 30,
        existed_wrappers: Any = None,
        *,
        schedule: Schedule | str | dict | None = None,
        **kwargs: Any,
    ):
        if evaluator is None:
            raise PruningError("GradientWeightPruner reads gradients of training, so it needs an evaluator")
        check_whole("training_steps", training_steps)
        self.training_steps = training_steps
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._before: dict[str, Tensor] = {}
        when = as_schedule(schedule) if schedule is not None else Schedule(interval_steps=training_steps)
        super().__init__(model, config_list, evaluator, existed_wrappers, schedule=when, **kwargs)

    def _watch_training(self, evaluator: Any) -> None:
        # the weights before a step are known before it, the gradients (Lightning's are made in the step) after it
        evaluator.patch_optimizer_step(before_step_tasks=[self._before_step], after_step_tasks=[])

    @torch.no_grad()
    def _before_step(self) -> None:
        if self.finished:
            return
        now = self.parameters
        held = list(self._before.values())
        if list(now) == list(self._before) and all(
            b.device == p.device for b, p in zip(held, now.values(), strict=True)
        ):
            torch._foreach_copy_(held, list(now.values()))  # one call, and no memory to find
        else:
            self._before = {name: p.detach().clone() for name, p in now.items()}

    @torch.no_grad()
    def _after_step(self) -> None:
        if not self.finished:
            self._count_step()
        super()._after_step()
        if self.finished:
            self._before = {}

    def _count_step(self) -> None:
        """Add |w·g| of the step that was just made; w is the weight before it."""
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not found:
            return
        gradients = [g.to_dense() if g.is_sparse else g for g in found.values()]
        products = torch._foreach_mul([self._before[name] for name in found], gradients)
        torch._foreach_abs_(products)
        if not all_finite(products):
            return
        self._count += 1
        if list(self._sums) == list(found):
            torch._foreach_add_(list(self._sums.values()), products)
        else:
            for name, product in zip(found, products, strict=True):
                self._sums[name] = self._sums[name] + product if name in self._sums else product

    def _scores(self) -> dict[str, Tensor]:
        if not self._sums:
            raise PruningError(
                "GradientWeightPruner saw no step with finite gradients; the training must call optimizer.step(), "
                "and not clear gradients inside it"
            )
        missing = [name for name in self.parameters if name not in self._sums]
        if missing:
            raise PruningError(
                f"{missing[0]}: no gradient reached it; exclude it, if it is frozen or has no part in the training"
            )
        scores = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return scores
