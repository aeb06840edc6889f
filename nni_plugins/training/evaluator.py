"""The loop as NNI's ``TorchEvaluator``, so that NNI's pruners and ours can drive it. Importing this imports NNI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nni.compression.utils.evaluator import TorchEvaluator
from torch import nn

from nni_plugins.training.loop import Loop, batches_of


class _OptimizerBuilder:
    """Stands for NNI's record of a traced optimizer: builds the recipe's for a wrapped model."""

    def __init__(self, loop: Loop, names: list[str]) -> None:
        self.loop, self.names = loop, names

    def call(self, model: nn.Module, wrapped_names: dict[str, str] | None) -> torch.optim.Optimizer:
        from nni_plugins.training.tasks import build_optimizer

        wanted = {(wrapped_names or {}).get(name, name) for name in self.names}
        named = [(name, parameter) for name, parameter in model.named_parameters() if name in wanted]
        return build_optimizer(self.loop.recipe, named)


class RecipeEvaluator(TorchEvaluator):
    """NNI's evaluator over a recipe's loop.

    It differs from NNI's in one thing: the optimizer comes from the recipe, so that it needs no ``nni.trace`` and
    may be any function. Score parameters that a pruner adds are not in it, as with NNI's.

    Parameters
    ----------
    loop
        The training loop. Each ``train(max_steps, max_epochs)`` is a training with its own schedule.
    """

    after_step: Callable[[], None] | None = None
    """Called after each optimizer step and the tasks of a compressor."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        super().__init__(
            training_func=self._train,
            optimizers=[],
            training_step=loop.training_step,
            dummy_input=loop.place(loop.data.example),
            evaluating_func=self._evaluate,
        )
        self._train_with_single_optimizer = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, for pruners with a schedule by epochs."""
        return batches_of(self.loop.data.train)

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        names = [name for name, _ in pure_model.named_parameters()]
        self._optimizer_helpers = [_OptimizerBuilder(self.loop, names)]
        self._lr_scheduler_helpers: list[Any] = []
        self._lrs_opt_map: dict[int, int] = {}
        self._initialization_complete: bool = True

    def _train(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer,
        training_step: Any,
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.loop.train(
            model,
            optimizers,
            training_step,
            max_epochs=max_epochs,
            max_steps=max_steps,
            after_step=self.after_step,
        )

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        value = self.loop.evaluate(model)
        return {"default": self.loop.metric.better(value), self.loop.metric.name: value}
