"""Taylor: a unit matters as much as the loss would change without it, by the Taylor expansion in its gate.

- ``weight`` (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019): Σ(w·dL/dw)² over
  all that goes with the unit; each element is squared, then summed.
- ``gate`` (same paper): (g·dL/dg)² for a gate g=1 after the norm, per minibatch. The gate's derivative is read
  from the parameters that it would multiply (g·dL/dg = γ·dL/dγ + β·dL/dβ), so the model is not changed. A gate
  shared by n producers, as on a skip connection, collects n gradients and is divided by n.
- ``activation`` (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR
  2017): |mean over positions of gradient × activation|, averaged over examples, L2-normalised per layer.

Second order replaces a = g·dL/dg by −a + ½g²H. Asks training for ``training_steps`` minibatches between prunings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import ChannelGroup, Member
from nni_plugins.pruners.base import GroupPruner
from nni_plugins.pruners.config import check_whole
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.gradients import OutputGradients, WeightGradients
from nni_plugins.pruners.schedule import Schedule, as_schedule
from nni_plugins.pruners.score import group_sums, member_sums

VARIANTS = ("weight", "gate", "activation")


class TaylorPruner(GroupPruner):
    """Remove the units without which the loss would change least.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's.
    evaluator : nni Evaluator
        Its training is what the gradients are read from; it changes the weights, as any training does.
    training_steps : int
        Minibatches (optimizer steps) that a score is averaged over: the last ones before each pruning. What trains
        before them costs nothing more.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    variant : {'weight', 'gate', 'activation'}
        Which criterion.
    order : {1, 2}
        Order of the expansion; the activation variant has the first only.
    probes : int
        Second order: random directions for each backward pass (Hutchinson's estimate of the Hessian's diagonal).
    momentum : float
        Of the exponential average of scores between prunings, where the schedule has several.
    seed : int
        Of the random directions.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`.
    """

    needs_training = True
    _kept_state = ("_averaged", "_collector")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any,
        training_steps: int = 30,
        existed_wrappers: Any = None,
        *,
        variant: str = "weight",
        order: int = 1,
        probes: int = 1,
        momentum: float = 0.9,
        seed: int = 0,
        schedule: Schedule | str | dict | None = None,
        **kwargs: Any,
    ):
        if variant not in VARIANTS:
            raise PruningError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
        if order not in (1, 2) or (order == 2 and variant == "activation"):
            raise PruningError(f"order is {order} with variant {variant!r}; it must be 1, or 2 for weight and gate")
        check_whole("training_steps", training_steps)
        check_whole("probes", probes)
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise PruningError(f"momentum is {momentum!r}; it must be a number in [0, 1)")
        if evaluator is None:
            raise PruningError("TaylorPruner reads gradients of training, so it needs an evaluator")
        self.variant, self.order, self.probes, self.momentum = variant, order, probes, momentum
        self.training_steps = training_steps
        self._generator = torch.Generator().manual_seed(seed)
        self._averaged: dict[str, Tensor] = {}
        when = as_schedule(schedule) if schedule is not None else Schedule(interval_steps=training_steps)
        if when.shape == "iterative" and not when.start_step and not when.start_epoch and when.interval_epochs is None:
            when = replace(when, start_step=training_steps)  # what prunes first must have seen something
        super().__init__(model, config_list, evaluator, existed_wrappers, schedule=when, **kwargs)
        self._sites = {group.name: self._gate_sites(group) for group in self.groups}
        self._collector = self._make_collector()

    def _gate_sites(self, group: ChannelGroup) -> list[Member]:
        """Members that a gate would multiply: the norms', which come after the producers, or the producers'."""
        norms = [m for m in group.members if m.role == "scale" and _is_norm(self.bound_model.get_submodule(m.module))]
        if not norms and any(m.role == "statistic" for m in group.members) and self.variant == "gate":
            raise PruningError(
                f"{group.name}: its norm has no scale, so a gate after it has none; use variant='weight'"
            )
        return norms or [m for m in group.members if m.role == "out"]

    def _make_collector(self) -> WeightGradients | OutputGradients:
        if self.variant == "activation":
            channels: dict[str, set[int]] = {}
            for member in (m for members in self._sites.values() for m in members):
                channels.setdefault(_caller(member), set()).add(self._channels_of(member))
            modules = {name: self.bound_model.get_submodule(name) for name in channels}
            return OutputGradients(modules, channels)
        signs = None if self.order == 1 else self._unit_signs if self.variant == "gate" else self._element_signs
        parameters = self.parameters
        if self.variant == "gate":
            names = {m.name for members in self._sites.values() for m in members}
            parameters = {name: tensor for name, tensor in parameters.items() if name in names}
        return WeightGradients(parameters, self._gate_sums if self.variant == "gate" else dict, signs, self.probes)

    def _watch_training(self, evaluator: Any) -> None:
        self._collector.active = self._due_within(self.training_steps)
        self._collector.attach(evaluator)

    def _after_step(self) -> None:
        if self._collector.active:
            self._collector.end_of_minibatch()
        super()._after_step()
        self._collector.active = self._due_within(self.training_steps)

    def _scores(self) -> dict[str, Tensor]:
        if self._collector.moments.count == 0 and (self.variant != "activation" or self._step == 0):
            raise PruningError(
                "TaylorPruner saw no minibatch with finite gradients; the training must call optimizer.step()"
            )
        importance = self._collector.moments.importance()
        self._collector.reset()
        for group in self.groups:
            score = self._group_score(group, importance)
            old = self._averaged.get(group.name)
            self._averaged[group.name] = score if old is None else self.momentum * old + (1 - self.momentum) * score
        return {name: score.clone() for name, score in self._averaged.items()}

    def _group_score(self, group: ChannelGroup, importance: dict[str, Tensor]) -> Tensor:
        if self.variant == "weight":
            score = group_sums(group, importance)
        elif self.variant == "gate":
            score = importance.get(group.name)
        else:
            sites = {  # one for each module, of which it has as many channels as its output
                _caller(m): m
                for m in self._sites[group.name]
                if _caller(m) in importance and importance[_caller(m)].shape[0] == self._channels_of(m)
            }
            layers = [_unit_sums(importance[name], m) for name, m in sites.items()]
            score = torch.stack(layers).mean(0) if layers else None
        if score is None:
            why = "no gradient reached it"
            if self.variant == "activation":
                why = "no gradient of it was seen, as a channel of a module's output"
            more = "" if self.variant == "weight" else "use variant='weight', or "
            raise PruningError(f"{group.name}: {why} (variant {self.variant!r}); {more}exclude it")
        return score

    def _channels_of(self, member: Member) -> int:
        return self.graph.shapes[member.name][member.dim]

    def _gate_sums(self, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """Signed sums of the products over each unit's gate sites, divided by the number of sites."""
        sums = {}
        for name, members in self._sites.items():
            found = [member_sums(products[m.name], m) for m in members if m.name in products]
            if found:
                sums[name] = torch.stack(found).sum(0) / len({m.module for m in members})
        return sums

    def _element_signs(self) -> dict[str, Tensor]:
        """Independent Rademacher signs for every weight."""
        return {name: self._signs(p.shape).to(p) for name, p in self.parameters.items()}

    def _unit_signs(self) -> dict[str, Tensor]:
        """Rademacher signs, one for each unit, spread over the elements that its gate multiplies."""
        spread = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        for group in self.groups:
            signs = self._signs((group.size, 1))
            for member in self._sites[group.name]:
                target = spread[member.name]
                along = torch.zeros(target.shape[member.dim])
                along[torch.as_tensor(member.indices)] = signs
                shape = [-1 if dim == member.dim else 1 for dim in range(target.dim())]
                target += along.to(target).view(shape)
        return spread

    def _signs(self, shape: Any) -> Tensor:
        return torch.randint(0, 2, tuple(shape), generator=self._generator).float().mul_(2).sub_(1)


def _caller(member: Member) -> str:
    """The module whose output a member makes: a parametrized weight is a module of its own, which gives the weight."""
    return f".{member.module}".partition(".parametrizations.")[0][1:]


def _unit_sums(channels: Tensor, member: Member) -> Tensor:
    """Sums over each unit's channels, float64 [size], of values that are normalised over all."""
    share = (channels / channels.norm().clamp_min(1e-30)).double()
    return share[torch.as_tensor(member.indices, device=share.device)].sum(1)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
