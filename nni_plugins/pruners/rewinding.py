"""A training run as it was after some step: weights, buffers, optimizers, schedules; and going back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.evaluators import schedulers_of


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; not masks, nor the masked products that wrappers leave in the modules."""
    made = set()
    for name, module in model.named_modules():
        wrapper = getattr(module, "_nni_wrapper", None)
        for target in getattr(wrapper, "pruning_target_spaces", {}):
            made |= {f"{name}.{target}".lstrip("."), f"{name}._nni_wrapper.{target}_mask".lstrip(".")}
    found = dict(model.named_parameters()) | {k: b for k, b in model.named_buffers() if k not in made}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class Snapshot:
    """What is gone back to. Weights and optimizers are taken at different moments of a step.

    After the step that is gone back to, the weights and buffers are taken; just before the next, when schedulers have
    moved on, the optimizers and schedulers.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.optimizers: dict[str, Any] = {}
        self.schedulers: list[Any] = []
        self._lambdas: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return all that is held, for a pruner's checkpoint."""
        return {"tensors": self.tensors, "optimizers": self.optimizers, "schedulers": self.schedulers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what was saved."""
        self.tensors, self.optimizers = state["tensors"], state["optimizers"]
        self.schedulers, self._lambdas = state["schedulers"], []

    def take_tensors(self, model: nn.Module) -> None:
        """Copy the weights and buffers."""
        self.tensors = {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}

    def take_optimizer(self, key: str, optimizer: torch.optim.Optimizer, evaluator: Any) -> None:
        """Copy an optimizer's state, and with the first one the schedulers'."""
        if not self.optimizers:
            self.schedulers = [deepcopy(_scheduler_state(s)) for s in schedulers_of(evaluator)]
            self._lambdas = [_lambdas(s) for s in schedulers_of(evaluator)]
        self.optimizers[key] = deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def give_tensors(self, model: nn.Module) -> None:
        """Put the weights and buffers back, in place."""
        now = live_tensors(model)
        for name, saved in self.tensors.items():
            now[name].data.copy_(saved)

    def give_optimizer(self, key: str, optimizer: torch.optim.Optimizer, *, memory: bool, rates: bool) -> None:
        """Put an optimizer's memory back, or its learning rates and other settings, or both."""
        saved = self.optimizers.get(key)
        if saved is None:
            return
        state = optimizer.state_dict()
        if memory:
            state["state"] = deepcopy(saved["state"])
        if rates:
            state["param_groups"] = deepcopy(saved["param_groups"])
        optimizer.load_state_dict(state)

    def give_schedulers(self, evaluator: Any) -> None:
        """Put the schedulers back, with the functions that they call."""
        for index, (scheduler, state) in enumerate(zip(schedulers_of(evaluator), self.schedulers, strict=False)):
            scheduler.load_state_dict(deepcopy(state))
            # transformers' own are functions of the number of steps that are left, which is not the number there were
            _give_lambdas(scheduler, self._lambdas[index] if self._lambdas else None)


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    return scheduler.state_dict()


def _lambdas(scheduler: Any) -> Any:
    return getattr(scheduler, "lr_lambdas", None), [_lambdas(s) for s in getattr(scheduler, "_schedulers", [])]


def _give_lambdas(scheduler: Any, held: Any) -> None:
    if held is None:
        return
    if held[0] is not None:
        scheduler.lr_lambdas = list(held[0])
    for child, own in zip(getattr(scheduler, "_schedulers", []), held[1], strict=False):
        _give_lambdas(child, own)


def key_of(optimizer: torch.optim.Optimizer, names: Callable[[], Iterable[tuple[str, Tensor]]]) -> str | None:
    """Name an optimizer by the first parameter of the model that it steps; None where it steps none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return next((name for name, parameter in names() if id(parameter) in held), None)
