"""What every pruner of single weights shares: targets, budgets, masks, N:M patterns.

A method is a subclass with a ``_scores`` (how important is each weight). How a budget is shared out between layers is
in :mod:`~nni_plugins.pruners.densities`, patterns are in :mod:`~nni_plugins.pruners.patterns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.base.compressor import register_scalers
from torch import Tensor, nn

from nni_plugins.pruners.config import check_choice, checked_config
from nni_plugins.pruners.densities import DENSITIES, kept_counts, layer_densities
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.life import Masks, PrunerBase
from nni_plugins.pruners.patterns import Pattern, as_pattern, input_layout
from nni_plugins.pruners.ranks import averaged_over_ranks
from nni_plugins.pruners.regrow import top
from nni_plugins.pruners.schedule import Schedule
from nni_plugins.pruners.weight_targets import SharedNames, WeightClaim, resolve_weights
from nni_plugins.pruners.wrapping import attach_targets

if TYPE_CHECKING:
    from nni.compression.base.wrapper import ModuleWrapper
    from nni.compression.utils.evaluator import Evaluator

NORMALISE: dict[str, Any] = {"mean": lambda s: s.mean(), "l2": lambda s: s.norm(), "max": lambda s: s.max()}


class WeightPruner(PrunerBase):
    """Base of the pruners that mask single weights.

    Any module that holds a parameter ``weight`` can be selected (linear, convolution, transposed convolution, embedding
    ...), and those that hold several matrices (LSTM, MultiheadAttention's input projection).

    Parameters
    ----------
    model : torch.nn.Module
        The model; not wrapped by another compressor (use ``from_compressor`` for that).
    config_list : list of dict
        NNI's. ``sparse_ratio`` is the fraction of the weights to remove, of those that the entry selects together;
        ``granularity`` may be a block, such as ``[4, 4]``, or ``in_channel`` and ``out_channel``; single weights by
        default. Weights that an earlier pruner removed stay removed, and count.
    evaluator : nni Evaluator, optional
        Trains the model, where the method or the schedule needs it.
    existed_wrappers : dict, optional
        Of an earlier compressor; given by ``from_compressor``.
    dummy_input : optional
        Not needed: nothing is watched. Taken so that all pruners are made alike.
    scope : {'local', 'global'}
        Rank weights within a layer, or over all layers of the entry.
    density : {'uniform', 'erk', 'global'}, optional
        How the weights that stay are shared out between layers: all layers alike, more to thin ones (Erdős–Rényi
        kernel), or by score, which is what ``scope='global'`` does.
    pattern : Pattern or str, optional
        Such as ``'2:4'``: at most 2 of 4 consecutive inputs of a weight are kept. A ``sparse_ratio`` above that of the
        pattern removes more. Where the schedule has several times, blocks lose one weight after the other.
    normalise : {'mean', 'l2', 'max', None}, optional
        What a layer's scores are divided by before they are ranked with those of others.
    schedule : Schedule, str or dict, optional
        When to prune: one shot by default.

    Attributes
    ----------
    scores : dict of str to torch.Tensor
        Importance of each weight at the last pruning, by the parameter's full name.

    Raises
    ------
    PruningError
        The configuration selects nothing that can be pruned.
    BudgetError
        From ``compress``: the bounds of the configuration do not admit its sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        dummy_input: Any = None,
        scope: str = "local",
        density: str | None = None,
        pattern: Pattern | str | None = None,
        normalise: str | None = None,
        schedule: Schedule | str | dict | None = None,
    ):
        check_choice("scope", scope, ("local", "global"))
        check_choice("density", density, (None, *DENSITIES, "global"))
        check_choice("normalise", normalise, (None, *NORMALISE))
        if scope == "global" and density not in (None, "global"):
            raise PruningError(f"scope is 'global', which ranks all layers together, but density is {density!r}")
        self.density = density or ("global" if scope == "global" else "uniform")
        self.scope = "global" if self.density == "global" else "local"
        self.pattern, self.normalise = as_pattern(pattern), normalise
        self.scores: dict[str, Tensor] = {}
        self._begin(schedule)
        asked = checked_config(config_list)
        self.claims: list[WeightClaim] = resolve_weights(model, asked)
        self._shared = SharedNames(model)
        self._layouts = {claim.name: input_layout(model.get_submodule(claim.module)) for claim in self.claims}
        wrappers, self._targets = attach_targets(
            model, self._shared, [claim.name for claim in self.claims], existed_wrappers or {}
        )
        # NNI would look the selected modules up by class name; their targets are made already
        super().__init__(model, [], evaluator, wrappers)
        self.config_list = asked
        self._expose_settings()
        if self.pattern is not None:
            self._check_pattern(self.pattern)

    # -- what a method gives -------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        """Importance of each weight: of the weight's shape, by the parameter's full name."""
        raise NotImplementedError

    # -- what a method uses --------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live weights by full name, tied ones once; masks are not applied."""
        return {claim.name: self._targets[claim.name].target for claim in self.claims}

    @property
    def weight_masks(self) -> dict[str, Tensor]:
        """The live masks by full name, 1 where kept."""
        return {claim.name: self._targets[claim.name].mask for claim in self.claims}

    @property
    def sparsity(self) -> float:
        """Fraction of the selected weights that is masked now."""
        masks = self.weight_masks.values()
        return 1.0 - sum(int(mask.count_nonzero()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)

    def prune(self, fraction: float = 1.0) -> Masks:
        """Score, select and set masks so that ``fraction`` of the asked sparsity is removed; return the masks."""
        self.scores = averaged_over_ranks(self._scores())
        return self._set(self.select(self.scores, fraction))

    def _set(self, kept: Mapping[str, Tensor]) -> Masks:
        masks: Masks = {}
        for name, keep in kept.items():
            for alias in (name, *self._shared.aliases.get(name, ())):
                space = self._targets[alias]
                masks.setdefault(space._wrapper.name, {})[space._target_name] = keep.to(space.mask)
        self.update_masks(masks)
        return masks

    def select(self, scores: Mapping[str, Tensor], fraction: float = 1.0) -> dict[str, Tensor]:
        """Which weights to keep, given their scores: bool, by full name. What is masked already stays so."""
        pools: dict[Any, list[WeightClaim]] = {}
        for claim in self.claims:
            pools.setdefault(claim.pool, []).append(claim)
        kept: dict[str, Tensor] = {}
        for (kind, key), claims in pools.items():
            where = f"global_group_id {key}" if kind == "id" else f"config_list[{key[0]}]"
            kept |= self._select_pool(where, kind == "id" or self.scope == "global", claims, scores, fraction)
        return kept

    # -- how ------------------------------------------------------------------------------------------------------

    def _select_pool(
        self, where: str, together: bool, claims: list[WeightClaim], scores: Mapping[str, Tensor], fraction: float
    ) -> dict[str, Tensor]:
        alive, blocks, pattern = {}, {}, self._pattern_at(fraction)
        for claim in claims:
            space, score = self._targets[claim.name], scores[claim.name].detach()
            alive[claim.name] = space.mask != 0
            if pattern is not None:
                ranked = score.masked_fill(~alive[claim.name], -torch.inf)
                alive[claim.name] &= pattern.mask(ranked, *self._layouts[claim.name])
            value = (score * alive[claim.name]).float()
            blocks[claim.name] = value if space._scaler is None else space._scaler.shrink(value)
        live = {name: self._shrunk(name, mask) for name, mask in alive.items()}
        current = {claim.name: self._current(claim, fraction) for claim in claims}
        asked = {(s["sparse_ratio"], s["sparse_threshold"]) for s in current.values()}
        if len(asked) > 1:
            raise PruningError(f"{where}: its entries ask for different sparsities {sorted(asked, key=str)}; give one")
        ratio, threshold = asked.pop()
        bounds = {
            n: (1 - (s["max_sparse_ratio"] or 1.0), 1 - (s["min_sparse_ratio"] or 0.0)) for n, s in current.items()
        }
        if threshold is not None:
            chosen = {name: self._above(blocks[name], live[name], threshold, bounds[name]) for name in blocks}
        elif together:
            chosen = self._ranked_together(blocks, live, 1 - ratio, bounds)
        else:
            chosen = self._ranked_apart(blocks, live, 1 - ratio, bounds)
        kept = {}
        for name, choice in chosen.items():
            scaler = self._targets[name]._scaler
            wide = choice if scaler is None else scaler.expand(choice.float(), list(alive[name].shape)) > 0
            kept[name] = wide & alive[name]
        if threshold is None and fraction >= 1:
            self._check_budget(where, kept, claims, ratio)
        return kept

    def _ranked_apart(self, scores: Any, live: Any, density: float, bounds: Any) -> dict[str, Tensor]:
        shapes = {name: self._targets[name].target.shape for name in scores}
        if self.density != "uniform":  # what an earlier pruner took from a layer goes to the others
            bounds = {name: (low, min(high, float(live[name].float().mean()))) for name, (low, high) in bounds.items()}
        given = layer_densities(shapes, density, self.density, bounds)
        sizes = {name: (score.numel(),) for name, score in scores.items()}
        counts = kept_counts(sizes, given, joint=self.density != "uniform")
        return {name: _best_live(scores[name], live[name], counts[name]) for name in scores}

    def _ranked_together(self, scores: Any, live: Any, density: float, bounds: Any) -> dict[str, Tensor]:
        """The highest scores over all layers; of each layer at least, and at most, what its bounds say."""
        sure, maybe = {}, {}
        for name, score in scores.items():
            least, most = (round(bound * score.numel()) for bound in bounds[name])
            sure[name] = _best_live(score, live[name], max(least, 1))
            maybe[name] = _best_live(score, live[name], max(most, 1)) & ~sure[name]
        width = {name: self._targets[name].target.numel() / scores[name].numel() for name in scores}
        total = sum(self._targets[name].target.numel() for name in scores)
        left = density * total - sum(float(sure[name].sum()) * width[name] for name in scores)
        device = next(iter(scores.values())).device
        values = torch.cat([self._comparable(scores[name], live[name])[maybe[name]].to(device) for name in scores])
        if len(set(width.values())) == 1:
            chosen = top(values, round(left / next(iter(width.values()))))
        else:  # blocks of different sizes: as many as fit
            weight = torch.cat([torch.full((int(maybe[n].sum()),), width[n], dtype=torch.float64) for n in scores])
            order = values.cpu().sort(descending=True, stable=True).indices
            chosen = torch.zeros(len(values), dtype=torch.bool)
            chosen[order] = weight[order].cumsum(0) <= left
        parts = chosen.split([int(maybe[name].sum()) for name in scores])
        for (name, may), part in zip(maybe.items(), parts, strict=True):
            sure[name][may] = part.to(may.device)
        return sure

    def _comparable(self, score: Tensor, live: Tensor) -> Tensor:
        if self.normalise is None or not live.any():
            return score
        scale = float(NORMALISE[self.normalise](score[live]))
        return score / scale if scale > 0 else score

    def _above(self, score: Tensor, live: Tensor, threshold: float, bounds: tuple[float, float]) -> Tensor:
        count = int(((score >= threshold) & live).sum())
        least, most = (round(bound * score.numel()) for bound in bounds)
        return _best_live(score, live, max(min(max(count, least), most), 1))

    def _shrunk(self, name: str, alive: Tensor) -> Tensor:
        scaler = self._targets[name]._scaler
        return alive if scaler is None else scaler.shrink(alive.float()) > 0

    def _current(self, claim: WeightClaim, fraction: float) -> dict[str, Any]:
        """Settings in force: those on NNI's target space, which NNI's schedulers set, the ratio times ``fraction``."""
        space = self._targets[claim.name]
        keys = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio")
        setting = {key: getattr(space, key) for key in keys}
        for key in ("sparse_ratio", "min_sparse_ratio"):
            if setting[key] is not None:
                setting[key] *= fraction
        return setting

    def _check_budget(self, where: str, kept: Mapping[str, Tensor], claims: list[WeightClaim], ratio: float) -> None:
        sizes = [mask.numel() for mask in kept.values()]
        reached = 1 - sum(int(mask.sum()) for mask in kept.values()) / sum(sizes)
        coarse = max(self._targets[c.name].target.numel() / self._shrunk(c.name, kept[c.name]).numel() for c in claims)
        if reached < ratio - 0.01 - coarse * len(claims) / sum(sizes):
            raise BudgetError(
                f"{where} asks for {ratio:.3f} of the weights to go; with its max_sparse_ratio, and one left in every "
                f"layer, {reached:.3f} is the most",
                ratio, reached,
            )  # fmt: skip

    # -- patterns -------------------------------------------------------------------------------------------------

    def _pattern_at(self, fraction: float) -> Pattern | None:
        """The pattern on its way: 3:4 comes before 2:4; None where nothing has to go yet."""
        if self.pattern is None:
            return None
        n, m = self.pattern.n, self.pattern.m
        kept = max(n, math.ceil(m - fraction * (m - n) - 1e-9))
        return Pattern(kept, m) if kept < m else None

    def _check_pattern(self, pattern: Pattern) -> None:
        for claim in self.claims:
            space = self._targets[claim.name]
            if space.target.dim() < 2:
                raise PruningError(f"{claim.name}: a weight of one dimension has no {pattern} pattern; exclude it")
            if space._scaler is not None:
                raise PruningError(f"{claim.name}: it has granularity {space.granularity} and the pattern {pattern}")

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _expose_settings(self) -> None:
        """Put the settings on NNI's target spaces, where its schedulers read and set them, and its granularities."""
        mine: dict[str, dict[str, Any]] = {}
        for claim in self.claims:
            for alias in (claim.name, *self._shared.aliases.get(claim.name, ())):
                space = self._targets[alias]
                space._setting.update(claim.setting)
                space._setting["granularity"] = claim.setting.get("granularity", "default")
                mine.setdefault(space._wrapper.name, {})[space._target_name] = space
        register_scalers(mine, lambda _: None)
        for module, spaces in mine.items():
            self._target_spaces[module].update(spaces)


def _best_live(score: Tensor, live: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores among those alive: bool."""
    kept = torch.zeros_like(live)
    kept[live] = top(score[live], count)
    return kept
