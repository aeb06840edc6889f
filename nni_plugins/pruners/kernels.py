"""What pruners of whole kernels share: layers as tables of kernels, one budget for them, channels that die with them.

A method is a subclass with a ``_scores`` (how important is each kernel). What cuts what off is in
:mod:`~nni_plugins.pruners.synapses`, which norm is between which layers in :mod:`~nni_plugins.pruners.producers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.plan import mask_of
from nni_plugins.pruners.checkpoint import Planned
from nni_plugins.pruners.config import check_choice, checked_config, dummy_input_of
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.life import Masks, PrunerBase
from nni_plugins.pruners.producers import Producers
from nni_plugins.pruners.ranks import averaged_over_ranks
from nni_plugins.pruners.schedule import Schedule
from nni_plugins.pruners.scope import canonical_names, excluded_modules
from nni_plugins.pruners.synapses import Layout, Link, Unit, lifeline, spread, weakest
from nni_plugins.pruners.weight_targets import WeightClaim, resolve_weights
from nni_plugins.pruners.wrapping import attach_targets


class KernelPruner(Planned, PrunerBase):
    """Base of the pruners that remove kernels of convolutions, and single weights of linear layers.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's. It selects layers; ``sparse_ratio`` is the fraction of their kernels that goes (of a linear layer, of its
        weights), those of removed channels included.
    evaluator : nni Evaluator, optional
        Trains the model, where the method or the schedule needs it.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    dummy_input : tensor, tuple or dict, optional
        What the model is watched on; the evaluator's by default.
    scope : {'global', 'local'}
        One threshold for all layers of an entry, or one for each.
    target : {'synapses', 'params', 'macs'}
        What the sparsity is a fraction of, over the selected layers.
    normalise : {'row', 'layer', None}
        What makes the scores of layers comparable: with 'layer' they are divided by the root mean square of the L2
        norms of the layer's rows, with 'row' those of each row by its own norm where a batch norm follows, for there
        the scale of a row has no effect. What is left is a kernel's share in what its row gives.
    exact_only : bool
        Leave channels in whose removal does not equal their masking.
    schedule : Schedule, str or dict, optional
        When to prune: one shot by default.
    tolerance : float
        How far from the budget, as a fraction of the dense cost, is near enough.

    Attributes
    ----------
    scores : dict of str to torch.Tensor
        The kernels' scores at the last pruning, [rows, inputs] by the weight's full name.
    plan : Plan
        The channels that are kept.

    Raises
    ------
    PruningError
        The configuration selects no layer with kernels.
    BudgetError
        From ``compress``: the budget cannot be met.
    """

    _kept_state: tuple[str, ...] = ("scores",)

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        dummy_input: Any = None,
        scope: str = "global",
        target: str = "synapses",
        normalise: str | None = "row",
        exact_only: bool = True,
        schedule: Schedule | str | dict | None = None,
        tolerance: float = 0.02,
    ):
        check_choice("scope", scope, ("global", "local"))
        check_choice("target", target, ("synapses", "params", "macs"))
        check_choice("normalise", normalise, ("row", "layer", None))
        self.scope, self.target, self.normalise, self.tolerance = scope, target, normalise, tolerance
        self.scores: dict[str, Tensor] = {}
        self._begin(schedule)
        asked = checked_config(config_list)
        self._dummy_input = dummy_input_of(dummy_input, evaluator)
        self.graph = ChannelGraph.watch(model, self._dummy_input)
        self.claims = self._layers(model, asked)
        self._layouts = {
            c.name: Layout.of(model.get_submodule(c.module), model.get_parameter(c.name)) for c in self.claims
        }
        self._producers = Producers(self.graph, list(self._layouts))
        self._units = self._removable(model, asked, exact_only)
        self._links = self._make_links()
        members = {m.name for u in self._units for m in u.group.members if not self.graph.is_buffer[m.name]}
        names = [*self._layouts, *sorted(members - set(self._layouts))]
        wrappers, self._targets = attach_targets(model, self.graph, names, existed_wrappers or {})
        # NNI would look the selected modules up by class name; their targets are made already
        super().__init__(model, [], evaluator, wrappers)
        self.config_list = asked
        for claim in self.claims:
            space = self._targets[claim.name]
            space._setting.update({k: v for k, v in claim.setting.items() if k != "granularity"})
            self._target_spaces[claim.module][claim.parameter] = space
        self.plan = Plan(self.graph, {})

    # -- what a method gives -------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        """Importance of each kernel: [rows, inputs], by the weight's full name."""
        raise NotImplementedError

    # -- what there is -------------------------------------------------------------------------------------------

    def _layers(self, model: nn.Module, asked: list[dict]) -> list[WeightClaim]:
        """The layers with kernels that a configuration selects."""
        claims = [
            claim
            for claim in resolve_weights(model, asked)
            if claim.parameter == "weight"
            and isinstance(model.get_submodule(claim.module), (nn.Linear, nn.modules.conv._ConvNd))
        ]
        for index, _ in enumerate(asked):
            if not any(claim.entry == index for claim in claims):
                raise PruningError(
                    f"config_list[{index}]: no convolution or linear layer is selected, and only these have synapses"
                )
        return claims

    def _removable(self, model: nn.Module, asked: list[dict], exact_only: bool) -> list[Unit]:
        """The groups that may lose units, as far as the selected layers make or read them."""
        canonical = canonical_names(model)
        protected = {canonical[name] for entry in asked for name in excluded_modules(model, entry)}
        protected -= {claim.module for claim in self.claims}
        units = []
        for group in self.graph.groups:
            touched = {canonical.get(m.module, m.module) for m in group.members if m.role in ("out", "scale")}
            if group.prunable and (group.exact or not exact_only) and not touched & protected:
                unit = Unit.of(group, self._layouts, self.graph.is_buffer)
                units += [unit] * bool(unit.members)
        return units

    def _make_links(self) -> list[Link]:
        """Which layers feed which, where a norm is between that dead rows are masked in."""
        masked = {m.name for unit in self._units if unit.all_makers for m in unit.makers}
        made_by = {
            r.normalised: name for name, r in self._producers.readings.items() if r.normalised and name in masked
        }
        links = []
        for name, reading in self._producers.readings.items():
            if reading.norms and all(norm in made_by for norm, _ in reading.norms):
                makers = [(made_by[n], self._layouts[made_by[n]], torch.as_tensor(rows)) for n, rows in reading.norms]
                links.append(Link(name, self._layouts[name], makers))
        return links

    def _silent(self, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Places, by parameter, where biases and norms of dead rows would make a constant of nothing."""
        places: dict[str, Tensor] = {}
        for unit in self._units if alive else ():
            for member in unit.makers if unit.all_makers else ():
                rows = torch.as_tensor(member.indices).flatten()
                gone = rows[~self._layouts[member.name].rows_alive(alive[member.name])[rows]]
                norm = self._producers.readings[member.name].normalised
                for name in (f"{member.module}.bias", f"{norm}.weight", f"{norm}.bias"):
                    places[name] = torch.cat([places.get(name, gone[:0]), gone])
        return {name: rows for name, rows in places.items() if len(rows)}

    def _target(self, name: str) -> Tensor:
        target = self._targets[name].target
        assert target is not None
        return target

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live weights by full name, in their trained form while they are trained; masks are not applied."""
        return {name: self._target(name) for name in self._layouts}

    def _live(self, name: str) -> Tensor:
        """A parameter that may be wrapped or not."""
        if name in self._targets:
            return self._target(name)
        module, _, parameter = name.rpartition(".")
        owner = self.bound_model.get_submodule(module)
        held = getattr(getattr(owner, "_nni_wrapper", owner), parameter, None)
        return getattr(owner, parameter) if held is None else held

    # -- choosing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, fraction: float = 1.0) -> Masks:
        """Set masks so that ``fraction`` of the asked sparsity is removed; return them."""
        self.scores = averaged_over_ranks(self._scores())
        alive, dead = self._select(fraction)
        self.plan = Plan(self.graph, {name: ~gone.numpy() for name, gone in dead.items()})
        slices, silent = self.plan.masked_slices(), self._silent(alive)
        masks: Masks = {}
        for name in {**self._layouts, **slices, **silent}:
            for alias in (name, *self.graph.aliases.get(name, ())):
                space = self._targets.get(alias)
                if space is None or space.target is None:
                    continue
                mask = mask_of(space.target.detach(), slices.get(name, {}))
                mask = mask if space.mask is None else mask * space.mask
                if name in alive:
                    mask = mask * self._layouts[name].wide(alive[name]).to(mask)
                if name in silent:
                    mask.index_fill_(0, silent[name].to(mask.device), 0)
                masks.setdefault(space._wrapper.name, {})[space._target_name] = mask
        self.update_masks(masks)
        return masks

    def _comparable(self, name: str, strength: Tensor, live: Tensor) -> Tensor:
        """Strengths without the scales that have no effect; −1 where a synapse is dead."""
        value = strength.double().cpu() * live
        norms = self._layouts[name].row_norms(value)
        if self.normalise == "layer" or not self._producers.readings[name].normalised:
            norms = norms.square().mean().sqrt()
        if self.normalise is not None:
            value = value / norms.clamp_min(1e-30)
        return value.masked_fill(~live, -1.0)

    def _select(self, fraction: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The synapses that stay, bool [rows, inputs] by weight, and the dead units, bool [size] by group."""
        live = {}
        for name in self._layouts:
            mask = self._targets[name].mask
            table = torch.ones(self._layouts[name].shape) if mask is None else mask.cpu()
            live[name] = (table != 0).flatten(2).any(2) if table.dim() > 2 else table != 0
        values = {name: self._comparable(name, self.scores[name], live[name]) for name in live}
        sure = lifeline(values, self._units)
        tables, cost = dict(live), self.graph.cost().modules if self.target == "macs" else {}
        each = {
            "synapses": lambda c: 1.0,
            "params": lambda c: float(self._layouts[c.name].kernel_size),
            "macs": lambda c: cost.get(c.module, (0, 0))[0] / live[c.name].numel(),
        }[self.target]
        pools: dict[Any, list[WeightClaim]] = {}
        for claim in self.claims:
            pools.setdefault(claim.pool, []).append(claim)
        checks = []
        for (kind, key), claims in pools.items():
            where = f"global_group_id {key}" if kind == "id" else f"config_list[{key[0]}]"
            together = kind == "id" or self.scope == "global"
            ratio, threshold = self._asked(claims, fraction, where)
            own, stay = self._bounded(claims, values, sure, fraction, together or threshold is not None)
            if threshold is not None:
                tables.update({name: (own[name] >= threshold) | stay[name] for name in own})
                continue
            costs = {claim.name: each(claim) for claim in claims}
            total = sum(costs[name] * own[name].numel() for name in own)
            others = {name: table for name, table in tables.items() if name not in own}
            near = self.tolerance / 10 * total
            tables = weakest(own, costs, self._units, self._links, others, budget=ratio * total, near=near, sure=stay)
            checks.append((where, ratio, costs, total))
        alive, dead = spread({name: table & live[name] for name, table in tables.items()}, self._units, self._links)
        for where, ratio, costs, total in checks if fraction >= 1 else ():
            gone = sum(float((~alive[name]).sum()) * each_cost for name, each_cost in costs.items()) / total
            if gone < ratio - self.tolerance:
                raise BudgetError(
                    f"{where}: sparsity {ratio:g} of {self.target} is out of reach: {gone:.4g} can go with its "
                    "max_sparse_ratio, and one path left through every layer", ratio, gone,
                )  # fmt: skip
        return alive, dead

    def _asked(self, claims: list[WeightClaim], fraction: float, where: str) -> tuple[float, float | None]:
        spaces = [self._targets[claim.name] for claim in claims]
        asked = {(space.sparse_ratio, space.sparse_threshold) for space in spaces}
        if len(asked) > 1:
            raise PruningError(f"{where}: its entries ask for different sparsities {sorted(asked, key=str)}; give one")
        ratio, threshold = asked.pop()
        return (ratio or 0.0) * fraction, threshold

    def _bounded(
        self, claims: list[WeightClaim], values: Any, sure: Any, fraction: float, together: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Strengths in which what must go is negative, and what must stay, for the bounds of each layer."""
        own, stay = {}, {}
        for claim in claims:
            space, value = self._targets[claim.name], values[claim.name]
            order = value.flatten().argsort(stable=True)
            size = len(order)
            least = round((space.min_sparse_ratio or 0.0) * fraction * size)
            most = round((space.max_sparse_ratio or 1.0) * size)
            rank = torch.empty(size, dtype=torch.float64)
            rank[order] = torch.arange(size, dtype=torch.float64) / size
            ranked = value.flatten().clone() if together else torch.where(value.flatten() < 0, -1.0, rank)
            ranked[order[:least]] = ranked[order[:least]].clamp_max(-0.5)
            keep = sure[claim.name].flatten().clone()
            keep[order[most:]] = True
            own[claim.name], stay[claim.name] = ranked.view_as(value), keep.view_as(value)
        return own, stay
