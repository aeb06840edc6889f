"""Dynamic sparse training: a sparse model that keeps exchanging weights while it trains.

SET (Mocanu et al., Nature Communications 2018), RigL (Evci et al., Rigging the Lottery, ICML 2020), ITOP (Liu et al.,
Do We Actually Need Dense Over-Parameterization?, ICML 2021). One update is in
:mod:`~nni_plugins.pruners.regrow`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.config import check_choice, check_whole
from nni_plugins.pruners.dense_gradients import DenseGradients, OptimizersOf
from nni_plugins.pruners.duration import KnownDuration
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.regrow import clear_state, drop_and_grow, drop_and_grow_all, drop_fraction, start_grown
from nni_plugins.pruners.weights import WeightPruner

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What a method of dynamic sparse training stands for.

    Parameters
    ----------
    growth : {'gradient', 'random'}
        Where weights grow.
    alpha : float
        Fraction of the active weights that the first update exchanges.
    every : int
        Optimizer steps between updates.
    until : float
        Fraction of training after which the mask stays.
    share : float
        At most this fraction of training lies between two updates.
    """

    growth: str
    alpha: float = 0.3
    every: int = 100
    until: float = 0.75
    share: float = 1.0


METHODS = {
    "set": Setting("random"),
    "rigl": Setting("gradient"),
    "itop": Setting("gradient", alpha=0.5, every=1500, until=1.0, share=0.05),
}
"""Settings by method. ITOP gives grown weights time to count, and does not stop exploring early."""


class DynamicSparsePruner(KnownDuration, WeightPruner):
    """Train sparse from the first step on, dropping small weights and growing others all the while.

    Every ``update_every`` steps the fraction ``α/2·(1 + cos(π·t/T_end))`` of the active weights, the smallest, is
    dropped, and as many grow: where the dense gradient is largest, or at random. Grown weights start at 0, with the
    optimizer's memory of them cleared. Dense gradients are made at those steps only.

    Parameters
    ----------
    model : torch.nn.Module
        Model to train.
    config_list : list of dict
        NNI's; ``sparse_ratio`` holds from the first step on.
    evaluator : nni Evaluator
        Trains.
    total_steps : int, optional
        Optimizer steps of the whole training, which the fraction falls over; by default those given to ``compress``,
        or what a Lightning or transformers trainer is set to.
    existed_wrappers : dict, optional
        Given by ``from_compressor``. What an earlier pruner removed does not grow again.
    method : {'rigl', 'set', 'itop'}
        The defaults of the arguments that follow.
    growth : {'gradient', 'random'}, optional
        Where weights grow.
    update_every : int, optional
        Optimizer steps between updates (ΔT): 100; for ITOP 1500, or a twentieth of training where that is less.
    alpha : float, optional
        Fraction that is exchanged at first: 0.3; for ITOP 0.5.
    end_fraction : float, optional
        Fraction of training after which the masks stay: 0.75; for ITOP 1.
    start : {'magnitude', 'random'}
        Which weights are active first.
    seed : int
        Of all that is random.
    density : {'erk', 'uniform', 'global'}
        How weights are shared out between layers; with 'global' they move between layers.
    **kwargs
        Those of :class:`~nni_plugins.pruners.weights.WeightPruner`. With a ``pattern``, weights are exchanged within
        its blocks.

    Attributes
    ----------
    updates : int
        Mask updates that were made.

    Examples
    --------
    >>> pruner = DynamicSparsePruner(model, [{'op_types': ['Conv2d'], 'sparse_ratio': 0.9}], evaluator)
    >>> model, masks = pruner.compress(max_steps=20000)
    """

    needs_training = True
    _kept_state = ("_every", "_started", "_pending", "_allowed", "_ever", "updates")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any,
        total_steps: int | None = None,
        existed_wrappers: Any = None,
        *,
        method: str = "rigl",
        growth: str | None = None,
        update_every: int | None = None,
        alpha: float | None = None,
        end_fraction: float | None = None,
        start: str = "magnitude",
        seed: int = 0,
        scope: str = "local",
        density: str | None = None,
        **kwargs: Any,
    ):
        check_choice("method", method, METHODS)
        check_choice("growth", growth, (None, "gradient", "random"))
        check_choice("start", start, ("magnitude", "random"))
        if evaluator is None:
            raise PruningError("DynamicSparsePruner exchanges weights while training, so it needs an evaluator")
        preset = METHODS[method]
        self.method, self.growth, self.start = method, growth or preset.growth, start
        self.alpha = preset.alpha if alpha is None else alpha
        self.end_fraction = preset.until if end_fraction is None else end_fraction
        for name, value in (("alpha", self.alpha), ("end_fraction", self.end_fraction)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise PruningError(f"{name} is {value!r}; it must be in [0, 1]")
        if kwargs.get("schedule") is not None:
            raise PruningError(
                "DynamicSparsePruner is sparse from the first step on and has no schedule; see its alpha"
            )
        check_whole("total_steps", total_steps, optional=True)
        check_whole("update_every", update_every, optional=True)
        self._total, self._every = total_steps, update_every
        self._generator = torch.Generator().manual_seed(seed)
        self._started = self._pending = False
        self._allowed: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        self.updates = 0
        if density is None:
            density = "global" if scope == "global" else "erk"
        super().__init__(model, config_list, evaluator, existed_wrappers, scope=scope, density=density, **kwargs)
        self._gradients = DenseGradients(
            {
                claim.name: [self._targets[n] for n in (claim.name, *self._shared.aliases.get(claim.name, ()))]
                for claim in self.claims
            },
            {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)},
        )
        self._optimizers = OptimizersOf(lambda: self.parameters.values())

    @property
    def explored(self) -> float:
        """Fraction of the selected weights that have ever been active (ITOP's in-time over-parameterisation rate)."""
        masks = self.weight_masks
        ever = sum(float((self._ever.get(n, m) != 0).sum()) for n, m in masks.items())
        return ever / max(sum(m.numel() for m in masks.values()), 1)

    # -- when -----------------------------------------------------------------------------------------------------

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if self.finished:
            return
        self._refuse_unknown_duration(evaluator)
        if not self._started:
            self._allowed = {n: m.bool() for n, m in self.weight_masks.items() if not bool(m.all())}
            self.prune()
            self._ever = {name: mask.bool() for name, mask in self.weight_masks.items()}
            self._started = True
        self._optimizers.watch()
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])
        if self._total is not None:
            self._prepare_next()

    def _fuse_postprocess(self, evaluator: Any) -> None:
        self._gradients.stop()
        self._optimizers.stop()
        if not self.finished and self._total is not None and self._step < self._total:
            _logger.warning(
                "%s: training ended after %d of %d steps; compress() again goes on",
                type(self).__name__, self._step, self._total,
            )  # fmt: skip

    def _after_step(self) -> None:
        if self.finished:
            return
        self._step += 1
        self._look_for_duration()
        if self._step >= self._total_steps():
            self.finished = True
            self._gradients.stop()
            return
        if self._due(self._step):
            self._update()
        self._prepare_next()

    def _prepare_next(self) -> None:
        """Collect dense gradients during the next step if it ends in an update, and only then."""
        if self._every is None:
            preset = METHODS[self.method]
            self._every = max(1, min(preset.every, int(preset.share * self._total_steps())))
        due = self.growth == "gradient" and self._due(self._step + 1)
        (self._gradients.start if due else self._gradients.stop)()

    @property
    def _end_step(self) -> int:
        return max(1, int(self.end_fraction * self._total_steps()))

    def _due(self, step: int) -> bool:
        return self._every is not None and step < self._end_step and (self._pending or step % self._every == 0)

    # -- what -----------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        if self.start == "magnitude":
            return {name: weight.detach().abs() for name, weight in self.parameters.items()}
        draw = {name: torch.rand(w.shape, generator=self._generator) for name, w in self.parameters.items()}
        return {name: value.to(self.parameters[name].device) for name, value in draw.items()}

    @torch.no_grad()
    def _update(self) -> None:
        """Exchange weights; put off by a step where the dense gradients are of a step that was skipped."""
        gradients: Mapping[str, Tensor] | None = None
        if self.growth == "gradient":
            gradients = self._gradients.collected()
            self._pending = gradients is None
            if gradients is None:
                return
        known = self.parameters if gradients is None else gradients
        # of a frozen weight what is dropped would come back as 0
        weights = {n: w for n, w in self.parameters.items() if n in known and w.requires_grad}
        masks = {name: self._targets[name].mask for name in weights}
        new = self._exchanged(weights, masks, gradients, drop_fraction(self._step, self._end_step, self.alpha))
        for name, mask in new.items():
            where = start_grown(weights[name], masks[name], mask)
            for optimizer in self._optimizers.holding(weights[name]):
                clear_state(optimizer, weights[name], where)
            self._ever[name] = self._ever[name].to(mask.device) | mask.bool()
        self._set(new)
        self.updates += 1

    def _exchanged(self, weights: Any, masks: Any, gradients: Any, fraction: float) -> dict[str, Tensor]:
        if self.density != "global":
            return {
                name: drop_and_grow(
                    weight, masks[name], None if gradients is None else gradients[name], fraction, self._generator,
                    pattern=self.pattern, layout=self._layouts[name], allowed=self._allowed.get(name),
                )
                for name, weight in weights.items()
            }  # fmt: skip
        new: dict[str, Tensor] = {}
        for pool in dict.fromkeys(claim.pool for claim in self.claims):
            own = [claim for claim in self.claims if claim.pool == pool and claim.name in weights]
            names = [claim.name for claim in own]
            bounds = {claim.name: self._count_bounds(claim) for claim in own}
            new |= drop_and_grow_all(
                {n: weights[n] for n in names}, {n: masks[n] for n in names},
                None if gradients is None else {n: gradients[n] for n in names}, fraction, self._generator,
                patterns=dict.fromkeys(names, self.pattern) if self.pattern else None,
                layouts=self._layouts, allowed=self._allowed, bounds=bounds,
            )  # fmt: skip
        return new

    def _count_bounds(self, claim: Any) -> tuple[int, int]:
        setting, size = self._current(claim, 1.0), self._targets[claim.name].target.numel()
        least, most = 1 - (setting["max_sparse_ratio"] or 1.0), 1 - (setting["min_sparse_ratio"] or 0.0)
        return max(1, round(least * size)), round(most * size)
