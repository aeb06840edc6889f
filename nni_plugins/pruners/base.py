"""What every pruner of channel groups shares: watching, wrapping, masks.

A method is a subclass with a ``_scores`` (how important is a unit). Selection under a budget is in
:mod:`~nni_plugins.pruners.select`, the schedule in :mod:`~nni_plugins.pruners.schedule`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_plugins.channels import ChannelGraph, ChannelGroup, Plan
from nni_plugins.channels.plan import mask_of
from nni_plugins.pruners.affine import affine_by_group
from nni_plugins.pruners.chain import SCOPES
from nni_plugins.pruners.checkpoint import Planned
from nni_plugins.pruners.config import check_choice, check_whole, checked_config, dummy_input_of
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.life import Masks, PrunerBase
from nni_plugins.pruners.ranks import as_on_rank_zero, averaged_over_ranks
from nni_plugins.pruners.schedule import Schedule
from nni_plugins.pruners.scope import make_pools, neighbourhoods, resolve
from nni_plugins.pruners.select import Pool, select
from nni_plugins.pruners.targets import NORMALISATIONS, TARGETS, latency_table
from nni_plugins.pruners.wrapping import attach_targets

if TYPE_CHECKING:
    from nni.compression.base.wrapper import ModuleWrapper
    from nni.compression.utils.evaluator import Evaluator

    from nni_plugins.channels.latency import LatencyTable


class GroupPruner(Planned, PrunerBase):
    """Base of the pruners that remove units of channel groups.

    Parameters
    ----------
    model : torch.nn.Module
        The model; not wrapped by another compressor (use ``from_compressor`` for that).
    config_list : list of dict
        NNI's. ``sparse_ratio`` is the fraction to remove of what ``target`` counts. With one budget, MACs and
        parameters are counted over the whole model; where entries have budgets of their own, each counts
        the modules that it selects. Units that an earlier pruner removed count as removed.
    evaluator : nni Evaluator, optional
        Trains the model, where the method or the schedule needs it.
    existed_wrappers : dict, optional
        Of an earlier compressor; given by ``from_compressor``.
    dummy_input : tensor, tuple or dict, optional
        What the model is watched on; the evaluator's by default.
    scope : {'local', 'global', 'isomorphic', 'knapsack'}
        Rank units within a group, over all of them, or within groups of the same neighbourhood; or, under a budget on
        a cost, choose the state that loses the least importance (HALP).
    target : {'channels', 'macs', 'params', 'latency'}
        What the sparsity is a fraction of. The latency is that of the dummy input on this machine, with the threads
        that torch has now; its table is measured once, and kept in a cache.
    round_to : int
        The channels kept are a multiple of this.
    exact_only : bool
        Leave out groups whose removal does not equal their masking (across LayerNorm, softmax ...).
    normalise : {'mean', 'l2', 'max', 'cost', None}, optional
        How the scores of different groups are made comparable; the method's own by default. ``cost`` divides
        them by what a unit costs of the target.
    schedule : Schedule, str or dict, optional
        When to prune: one shot by default.
    tolerance : float
        How far from the budget, as a fraction of the dense cost, is near enough.
    latency : LatencyTable, optional
        For the target latency: a table of this model, if one is at hand.
    affine : dict of str to (float, float), optional
        By the beginning of groups' names, a and b: their comparable scores s become a·s + b·m, m being the mean over
        all groups (Chin et al., "Towards Efficient Model Compression via Learned Global Ranking" (LeGR), CVPR 2020).

    Attributes
    ----------
    graph : ChannelGraph
        The model's channels.
    scores : dict of str to torch.Tensor
        Raw importance of each unit at the last pruning, float64 [size] by group name.
    plan : Plan
        What is kept.
    fusible : bool
        Whether the method can be fused with other compressors by ``from_compressor``.

    Raises
    ------
    PruningError
        The configuration selects nothing that can be pruned, or no dummy input is known.
    BudgetError
        From ``compress``: the budget cannot be met.
    """

    default_normalise: str | None = "mean"
    _kept_state: tuple[str, ...] = ("scores",)

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        dummy_input: Any = None,
        scope: str = "local",
        target: str = "channels",
        round_to: int = 1,
        exact_only: bool = True,
        normalise: str | None = "default",
        schedule: Schedule | str | dict | None = None,
        tolerance: float = 0.02,
        latency: LatencyTable | None = None,
        affine: Mapping[str, tuple[float, float]] | None = None,
    ):
        check_choice("scope", scope, SCOPES)
        check_choice("target", target, TARGETS)
        if normalise != "default":
            check_choice("normalise", normalise, NORMALISATIONS)
        check_whole("round_to", round_to)
        if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
            raise PruningError(f"tolerance is {tolerance!r}; it must be a number, at least 0")
        self.scope, self.target, self.round_to, self.tolerance = scope, target, round_to, tolerance
        self.normalise = self.default_normalise if normalise == "default" else normalise
        self.scores: dict[str, Tensor] = {}
        self._begin(schedule)
        self._dummy_input, self._exact_only = dummy_input_of(dummy_input, evaluator), exact_only
        asked = checked_config(config_list)
        self._look(model, asked, latency)
        self.affine = affine_by_group(affine or {}, [group.name for group in self.groups])
        wrappers, self._targets = self._attach(model, self._reached(), existed_wrappers or {})
        # NNI would look the selected modules up by class name; their targets are made already
        super().__init__(model, [], evaluator, wrappers)
        self.config_list = asked
        self._expose_settings()
        self.plan = Plan(self.graph, {name: ~gone for name, gone in self._dead_units().items()})

    # -- what a method gives -------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        """Importance of each unit of each group of ``self.groups``: float [size] by group name."""
        raise NotImplementedError

    def _look(self, model: nn.Module, asked: list[dict], latency: LatencyTable | None = None) -> None:
        """Watch the model, and find what the configuration asks to prune in it."""
        self.graph = ChannelGraph.watch(model, self._dummy_input)
        self._classes = neighbourhoods(model, self.graph)
        self.latency = (
            latency_table(self.graph, model, self._dummy_input, latency) if self.target == "latency" else None
        )
        self.resolved = resolve(model, asked, self.graph, exact_only=self._exact_only)

    def _reached(self) -> list[str]:
        """Names of the parameters that the groups reach, in forward order."""
        reached = (m.name for c in self.resolved.claims for m in c.group.members if not self.graph.is_buffer[m.name])
        return list(dict.fromkeys(reached))

    def _attach(
        self, model: nn.Module, names: Iterable[str], wrappers: Mapping[str, ModuleWrapper]
    ) -> tuple[dict[str, ModuleWrapper], Any]:
        """Give each parameter a place for its mask, NNI's target space in a wrapper; return wrappers and places."""
        return attach_targets(model, self.graph, names, wrappers)

    def _mask_of(self, name: str) -> Tensor | None:
        """The mask of a parameter, whichever pruner made it."""
        module, _, parameter = name.rpartition(".")
        wrapper = self._module_wrappers.get(module)
        space = wrapper.pruning_target_spaces.get(parameter) if wrapper is not None else None
        return None if space is None else space.mask

    # -- what a method uses --------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[ChannelGroup]:
        """The groups that the configuration asks to prune, in forward order."""
        return [claim.group for claim in self.resolved.claims]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live tensors of the groups' parameters, by their full name; masks are not applied."""
        return {name: space.target for name, space in self._targets.items() if space.target is not None}

    def prune(self, fraction: float = 1.0) -> Masks:
        """Score, select and set masks so that ``fraction`` of the asked sparsity is removed; return the masks."""
        self.scores = averaged_over_ranks(self._scores())
        kept = self._select({name: score.detach().cpu().numpy() for name, score in self.scores.items()}, fraction)
        if self.target == "latency":  # each rank has a clock of its own
            kept = as_on_rank_zero(kept)
        self.plan = Plan(self.graph, kept)
        masks: Masks = {}
        for name, dims in self.plan.masked_slices().items():
            for alias in (name, *self.graph.aliases.get(name, ())):
                space = self._targets.get(alias)
                if space is None or space.target is None:
                    continue  # a buffer, or a group that an earlier pruner has masked
                old = torch.ones_like(space.target) if space.mask is None else space.mask
                mask = mask_of(space.target.detach(), dims) * old
                masks.setdefault(space._wrapper.name, {})[space._target_name] = mask
        self.update_masks(masks)
        return masks

    def _select(self, scores: dict[str, np.ndarray], fraction: float, *, strict: bool = True) -> dict[str, np.ndarray]:
        """Keep masks by group name; short of the final sparsity, a budget that is missed is no error."""
        current = self._current_settings(fraction)
        final = self._asked_settings()
        pools = make_pools(self.resolved, current, scope=self.scope, classes=self._classes, latency=self.latency)
        return select(
            self.graph,
            [self._on_the_way(pool, final[pool.groups[0]]) for pool in pools],
            scores,
            target=self.target,
            round_to=self.round_to,
            normalise=self.normalise,
            dead=self._dead_units(),
            tolerance=self.tolerance,
            affine=self.affine,
            strict=strict and all((current[name]["sparse_ratio"] or 0) >= (final[name] or 0) for name in current),
        )

    def _on_the_way(self, pool: Pool, final: float | None) -> Pool:
        """The pool, with what is asked of it in the end where it does not ask for that yet."""
        return replace(pool, final=final) if final is not None and (pool.sparsity or 0.0) < final else pool

    def _refuse_unreachable(self) -> None:
        """Raise before any training where no scores could meet the budget."""
        try:
            GroupPruner._select(self, {group.name: np.ones(group.size) for group in self.groups}, 1.0)
        except BudgetError as error:
            if error.reachable < error.asked:
                raise

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _expose_settings(self) -> None:
        """Put the settings on NNI's target spaces, where its schedulers read and set them."""
        for name, space in self._targets.items():
            self._target_spaces[name.rpartition(".")[0]][space._target_name] = space
        self._claimed = {}
        for claim in self.resolved.claims:
            space = self._targets[f"{claim.module}.{claim.parameter}" if claim.module else claim.parameter]
            setting = {k: v for k, v in self.resolved.settings[claim.entry].items() if k != "granularity"}
            space._setting.update(setting)
            self._claimed[claim.group.name] = space

    def _current_settings(self, fraction: float) -> dict[str, dict[str, Any]]:
        """Settings in force for each group: those on NNI's target spaces, the ratio times ``fraction``."""
        keys = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio")
        current = {name: {key: getattr(space, key) for key in keys} for name, space in self._claimed.items()}
        for setting in current.values():
            for key in ("sparse_ratio", "min_sparse_ratio"):
                if setting[key] is not None:
                    setting[key] *= fraction
        return current

    def _asked_settings(self) -> dict[str, float | None]:
        """The sparsity that the configuration asks of each group in the end."""
        return {c.group.name: self.resolved.settings[c.entry].get("sparse_ratio") for c in self.resolved.claims}

    def _dead_units(self) -> dict[str, np.ndarray]:
        """Units, of any group, whose producers are all masked already: bool [size] by group name."""
        dead = {}
        for group in self.graph.groups:
            makers = [m for m in group.members if m.role == "out" and not m.parameter.endswith("bias")]
            makers = [m for m in makers if (m.name, m.dim) not in self.graph.trace.unmasked]
            masks = [self._mask_of(member.name) for member in makers] if group.prunable else []
            if not masks or any(mask is None for mask in masks):
                continue
            gone = np.ones(group.size, dtype=bool)
            for member, mask in zip(makers, masks, strict=True):
                assert mask is not None
                empty = (mask.movedim(member.dim, 0).reshape(mask.shape[member.dim], -1) == 0).all(dim=1).cpu().numpy()
                gone &= empty[member.indices].all(axis=1)
            if gone.any() and not gone.all():
                dead[group.name] = gone
        return dead
