"""L0: each unit gets a gate that is trained to be open or shut, under a budget.

Louizos et al., Learning Sparse Neural Networks through L0 Regularization, ICLR 2018 (the gates), and Wang et al.,
Structured Pruning of Large Language Models, EMNLP 2020 (the Lagrangian that meets a budget). A unit's gate
multiplies what its readers take from it: the columns of the weights that consume it. The loss therefore sees the
same whatever lies between (norms, activations, several producers), and a gate's last value is folded into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor, nn

from nni_plugins.channels import ChannelGroup, Member
from nni_plugins.pruners.base import GroupPruner
from nni_plugins.pruners.config import check_whole
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.gates import LIMIT, START, Gating, HardConcrete, open_probability
from nni_plugins.pruners.lagrangian import Lagrangian
from nni_plugins.pruners.life import Masks
from nni_plugins.pruners.loss_scale import LossProbe
from nni_plugins.pruners.ranks import averaged_over_ranks, distributed
from nni_plugins.pruners.schedule import Schedule
from nni_plugins.pruners.scope import make_pools
from nni_plugins.pruners.select import TARGETS


class L0Pruner(GroupPruner):
    """Train a hard concrete gate for each unit, so that the expected cost is what is asked; remove the closed ones.

    The gates have an Adam optimizer of the pruner's own. After ``training_steps`` the units are chosen by
    the probability that their gates are open, so that the budget is met exactly; what is left of the gates of the
    units that stay is multiplied into the weights.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's; each entry with a ``sparse_ratio``.
    evaluator : nni Evaluator
        Trains the weights; the gates are trained along.
    training_steps : int
        Optimizer steps until the units are chosen.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    warmup : float
        Fraction of the steps in which the budget tightens from the dense cost to the asked one.
    gate_rate : float, optional
        Learning rate of log α, which falls in the last 0.4 of the steps; by default such that a gate can close in a
        small part of them.
    multiplier_rate : float
        How fast the budget's multipliers climb, as a multiple of what was tried.
    seed : int
        Of the gates' noise.
    scope : {'global', 'local', 'isomorphic', 'knapsack'}
        With 'local' each group has a budget of its own.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`; there is no schedule but the gates' own.

    Attributes
    ----------
    gates : HardConcrete
        The gates; ``gates.log_alpha`` holds one number for each unit of ``groups``, in their order.
    lagrangian : Lagrangian
        The budget as a term of the loss; ``lagrangian.multipliers`` holds its two multipliers.
    """

    needs_training = True
    default_normalise = None
    _kept_state = ("gates", "lagrangian", "optimizer")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any,
        training_steps: int = 1000,
        existed_wrappers: Any = None,
        *,
        warmup: float = 0.5,
        gate_rate: float | None = None,
        multiplier_rate: float = 1.0,
        seed: int = 0,
        scope: str = "global",
        **kwargs: Any,
    ):
        if evaluator is None:
            raise PruningError("L0Pruner trains its gates along with the model, so it needs an evaluator")
        check_whole("training_steps", training_steps)
        if not isinstance(warmup, (int, float)) or not 0 <= warmup <= 1:
            raise PruningError(f"warmup is {warmup!r}; it must be a fraction of the steps, in [0, 1]")
        if kwargs.pop("schedule", None) is not None:
            raise PruningError("L0Pruner has no schedule but its gates'; give training_steps and warmup")
        self.training_steps, self.warmup, self.multiplier_rate = training_steps, warmup, multiplier_rate
        self._generator = torch.Generator().manual_seed(seed)
        when = Schedule(interval_steps=training_steps)
        super().__init__(model, config_list, evaluator, existed_wrappers, scope=scope, schedule=when, **kwargs)
        for index, setting in enumerate(self.resolved.settings):
            if setting.get("sparse_ratio") is None:
                raise PruningError(
                    f"config_list[{index}]: L0Pruner trains towards a budget; give sparse_ratio in place of "
                    "sparse_threshold"
                )
        self._sizes = {group.name: group.size for group in self.groups}
        dead = self._dead_units()
        self._alive = torch.cat([torch.as_tensor(~dead.get(n, np.zeros(s, bool))) for n, s in self._sizes.items()])
        self.gates = HardConcrete(len(self._alive), self._generator)
        self._sites = [(space, Gating(self.gates, dims, len(space.target.shape))) for space, dims in self._gate_sites()]
        self._table, self._never = self._units_by_group()
        self.lagrangian = self._make_lagrangian({name: int((~gone).sum()) for name, gone in dead.items()})
        self.gate_rate = gate_rate or min(max(20 / training_steps, 0.01), 0.5)
        self.optimizer = torch.optim.Adam([self.gates.log_alpha], betas=(0.9, 0.99), fused=True)
        self._probe = LossProbe()

    # -- gates and budget ----------------------------------------------------------------------------------------

    def _gate_sites(self) -> list[tuple[PruningTargetSpace, list[tuple[int, Tensor]]]]:
        """For each target space with gates: the dimensions, and the places of each index's gate."""
        spaces: dict[int, PruningTargetSpace] = {}
        dims: dict[int, dict[int, Tensor]] = {}
        start, last = 0, len(self._alive)
        for group in self.groups:
            for member in self._members(group):
                for name in (member.name, *self.graph.aliases.get(member.name, ())):
                    space = self._targets.get(name)
                    if space is None or space.target is None:
                        continue
                    spaces[id(space)] = space
                    size = space.target.shape[member.dim]
                    places = dims.setdefault(id(space), {}).setdefault(member.dim, torch.full((size,), last))
                    units = torch.arange(start, start + group.size)[:, None].expand(member.indices.shape)
                    places[torch.as_tensor(member.indices)] = units
            start += group.size
        return [(spaces[key], list(found.items())) for key, found in dims.items()]

    def _members(self, group: ChannelGroup) -> list[Member]:
        """The members that a group's gates multiply: its consumers, or where no weight consumes it, its producers."""
        fixed = self.graph.trace.unmasked
        usable = [m for m in group.members if not self.graph.is_buffer[m.name] and (m.name, m.dim) not in fixed]
        return [m for m in usable if m.role == "in"] or [m for m in usable if m.role == "out"] or usable

    def _make_lagrangian(self, dead: Mapping[str, int]) -> Lagrangian:
        sizes = np.array(list(self._sizes.values()))
        if self.scope == "local":
            counts = self._local_counts()
            asked = np.array([counts.get(name, size) for name, size in self._sizes.items()]) / sizes

            def cost(kept: Mapping[str, int]) -> np.ndarray:
                return np.array([kept[name] for name in self._sizes]) / sizes
        else:
            pools = make_pools(
                self.resolved, self._current_settings(1.0), scope=self.scope, classes=self._classes,
                latency=self.latency,
            )  # fmt: skip
            asked = np.array([1 - (pool.sparsity or 0.0) for pool in pools])
            measure = TARGETS[self.target]
            dense = np.array([measure(self.graph, {}, pool) for pool in pools])

            def cost(kept: Mapping[str, int]) -> np.ndarray:
                return np.array([measure(self.graph, {**dead, **kept}, pool) for pool in pools]) / dense

        steps = self.training_steps
        lagrangian = Lagrangian(cost, self._sizes, asked, round(self.warmup * steps), steps, self.multiplier_rate)
        lagrangian.begin(self._probability())
        return lagrangian

    def _local_counts(self) -> dict[str, int]:
        """The number of units that each group keeps under the local scope, whatever their scores."""
        try:
            kept = self._select({name: np.ones(size) for name, size in self._sizes.items()}, 1.0)
        except BudgetError:  # compress() says so
            return {}
        return {name: int(mask.sum()) for name, mask in kept.items()}

    def _probability(self) -> Tensor:
        return open_probability(self.gates.log_alpha) * self._alive

    @property
    def expected(self) -> Tensor:
        """Float32 [budgets]: the expected cost under the gates as they are, as a fraction of the dense one."""
        return self.lagrangian.expected(self._probability())

    # -- training ------------------------------------------------------------------------------------------------

    def _watch_training(self, evaluator: Any) -> None:
        for space, gating in self._sites:
            space.gating = gating
            space.apply_method = "gated_mul"
        self._probe.attach(evaluator)

    def _after_step(self) -> None:
        if not self.finished:
            self._train_gates()
        super()._after_step()

    @torch.no_grad()
    def _train_gates(self) -> None:
        """One step of the gates and multipliers, and new noise; a step whose gradients are not finite is left out."""
        self._follow(self.gates.log_alpha.device)
        gradient = self._gradient()
        if math.isfinite(gradient.sum()):
            probability = self._probability()
            by_probability = self.lagrangian.push(probability, self._step + 1)
            self.gates.log_alpha.grad = gradient + by_probability * probability * (1 - probability)
            left = 1 - self._step / self.training_steps
            self.optimizer.param_groups[0]["lr"] = self.gate_rate * min(max(left / 0.4, 0.05), 1.0)
            self.optimizer.step()
            self._bound()
        self.gates.draw()

    def _bound(self) -> None:
        """Keep log α in its range, and one gate of each group open: where all close, no gradient opens any again."""
        log_alpha = self.gates.log_alpha.clamp_(-LIMIT, LIMIT)
        table = log_alpha[self._table].add_(self._never)
        best = self._table.gather(1, table.argmax(1, keepdim=True)).flatten()
        log_alpha.index_put_((best,), log_alpha[best].clamp_min_(START))

    def _units_by_group(self) -> tuple[Tensor, Tensor]:
        """Int64 [groups, size of the largest]: places of gates; and what keeps padding and the dead from winning."""
        sizes = torch.tensor(list(self._sizes.values()))
        at = torch.arange(int(sizes.max()))
        first = (sizes.cumsum(0) - sizes)[:, None]
        table = torch.where(at < sizes[:, None], at + first, first)
        gone = torch.zeros(table.shape).masked_fill_(~self._alive[table], -2 * LIMIT)
        return table, gone.masked_fill_(at >= sizes[:, None], -torch.inf)

    def _gradient(self) -> Tensor:
        """The loss's gradient by log α, over all ranks, without the scale that AMP or accumulation gave the loss."""
        found, log_alpha, scale = self.gates.gradient(), self.gates.log_alpha, self._probe.take()
        found = torch.zeros_like(log_alpha) if found is None else found
        if not distributed():
            return found / scale.to(log_alpha)
        both = torch.cat([found, scale.reshape(1).to(log_alpha)])
        averaged_over_ranks({"both": both})
        return both[:-1] / both[-1]

    def _follow(self, device: torch.device) -> None:
        """Bring all that the gates are trained with to where the weights are."""
        self.lagrangian.move(device)
        if self._alive.device != device:
            self._alive, self._table, self._never = (t.to(device) for t in (self._alive, self._table, self._never))
            for state in self.optimizer.state.values():
                state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor)})

    # -- choosing ------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        return dict(zip(self._sizes, self._probability().double().split(list(self._sizes.values())), strict=True))

    def prune(self, fraction: float = 1.0) -> Masks:
        """Choose the units whose gates are most likely open, and fold the gates of those that stay into the weights."""
        masks = super().prune(fraction)
        self._fold()
        return masks

    @torch.no_grad()
    def _fold(self) -> None:
        done = set()
        for space, _ in self._sites:
            gating, target = space.__dict__.pop("gating", None), space.target
            space.apply_method = "mul"
            if gating is not None and target is not None and id(target) not in done:
                target.copy_(gating(target, training=False))
                done.add(id(target))  # tied weights have a space each
