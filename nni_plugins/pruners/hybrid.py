"""Hybrid: channels leave along a ramp, the weights that are left go on being exchanged, and the model shrinks live.

After Chase (Yin et al., Dynamic Sparsity Is Channel-Level Sparsity Learner, NeurIPS 2023): a channel's score is the
mean of |w| over all its entries, those included that are not active, so that a channel whose weights keep being dropped
comes to score low; channels go along a cubic ramp; the weights are exchanged as in RigL (Evci et al., ICML 2020); a few
more than the budget are active while exploring, which is paid back at the end.

Nothing is wrapped: masked weights are set to 0 after each optimizer step, so the forward is the model's own and every
gradient is dense already. That is what lets dead channels be taken out while training goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import Plan
from nni_plugins.pruners.bare import BareTarget, attach_bare, project
from nni_plugins.pruners.config import check_whole, checked_config
from nni_plugins.pruners.dense_gradients import OptimizersOf
from nni_plugins.pruners.duration import KnownDuration
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.exploration import PAID_BACK, Exploration, Layer
from nni_plugins.pruners.life import Masks
from nni_plugins.pruners.live import averaged, compact_live
from nni_plugins.pruners.patterns import Pattern, as_pattern, input_layout
from nni_plugins.pruners.rebased import Rebased
from nni_plugins.pruners.regrow import clear_state, start_grown
from nni_plugins.pruners.schedule import Schedule, as_schedule
from nni_plugins.pruners.scope import Resolved
from nni_plugins.pruners.score import member_sums
from nni_plugins.pruners.weight_targets import WeightClaim, resolve_weights

_logger = logging.getLogger(__name__)

RAMP_TIMES = 20
"""How often channels go along the ramp, at most."""


class HybridPruner(KnownDuration, Rebased):
    """Prune channels and exchange weights in one training run, and take dead channels out while it goes on.

    With an evaluator it is used as any pruner. In a training loop of one's own there is none: the pruner is given the
    optimizer, and told of each step::

        pruner = HybridPruner(model, config_list, total_steps=10_000, optimizer=optimizer, dummy_input=x)
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss_of(model(inputs), labels).backward()
            optimizer.step()
            pruner.step()

    Parameters
    ----------
    model : torch.nn.Module
        Model to train; it is changed in place, and stays unwrapped.
    config_list : list of dict
        NNI's. ``sparse_ratio`` is the fraction of what ``target`` counts that goes with whole channels.
    evaluator : nni Evaluator, optional
        Trains.
    total_steps : int, optional
        Optimizer steps of the whole training; by default those given to ``compress``, or what a Lightning or
        transformers trainer is set to.
    existed_wrappers : dict, optional
        Given by ``from_compressor``. The model is then wrapped by another compressor, and not compacted while training.
    optimizer : torch.optim.Optimizer or list of them, optional
        Of a loop of one's own.
    averages : iterable of torch.nn.Module
        Copies of the model that must shrink with it, such as ``torch.optim.swa_utils.AveragedModel``.
    density : float
        Fraction of single weights that is active at the end, of those in the channels that are left; 1 for all.
    over_density : float
        How much above that while exploring.
    pattern : Pattern or str, optional
        Such as ``'2:4'``: of the weights as they are at the end, along their inputs.
    ramp_end : float
        Fraction of training by which all channels have gone (used where no ``schedule`` is given).
    update_every : int, optional
        Optimizer steps between exchanges: 100, or a fiftieth of training where that is less.
    alpha : float
        Fraction of the active weights that is exchanged at first; it falls along a cosine.
    end_fraction : float
        Fraction of training after which no weights are exchanged.
    lasting : float
        Fraction that is exchanged even after training has ended, for models that go on learning; not with a pattern.
    compact : float
        Take dead channels out as soon as that saves this fraction of the present MACs, and when the ramp ends; 0 for
        never. Never inside a distributed run either: call :meth:`compact` there where the model is not wrapped.
    floor : float
        Fraction of each group's channels that stays, where the configuration has no ``max_sparse_ratio``.
    scope : {'global', 'local', 'isomorphic', 'knapsack'}
        As in :class:`~nni_plugins.pruners.base.GroupPruner`, like ``schedule`` and the rest.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`.

    Attributes
    ----------
    compactions : int
        How often dead channels were taken out.
    updates : int
        How often weights were exchanged.
    """

    needs_training = True
    _kept_state: tuple[str, ...] = (
        "_planned", "_every", "_started", "_record", "compactions", "updates",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        total_steps: int | None = None,
        existed_wrappers: Any = None,
        *,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        averages: Iterable[nn.Module] = (),
        density: float = 0.5,
        over_density: float = 0.05,
        pattern: Pattern | str | None = None,
        ramp_end: float = 0.8,
        update_every: int | None = None,
        alpha: float = 0.3,
        end_fraction: float = 0.75,
        lasting: float = 0.0,
        compact: float = 0.1,
        floor: float = 0.1,
        scope: str = "global",
        schedule: Schedule | str | dict | None = None,
        **kwargs: Any,
    ):
        fractions = {"density": density, "over_density": over_density, "ramp_end": ramp_end, "alpha": alpha,
                     "end_fraction": end_fraction, "lasting": lasting, "compact": compact, "floor": floor}  # fmt: skip
        for name, value in fractions.items():
            least = 1e-6 if name in ("density", "ramp_end") else 0.0
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
                raise PruningError(f"{name} is {value!r}; it must be in {'(' if least else '['}0, 1]")
        check_whole("total_steps", total_steps, optional=True)
        check_whole("update_every", update_every, optional=True)
        self._total, self._every = total_steps, update_every
        self.exploration = Exploration(density, over_density, as_pattern(pattern), alpha, end_fraction, lasting)
        self.ramp_end, self._compact_at, self.floor = ramp_end, compact, floor
        self.averages = list(averages)
        self._given_schedule = None if schedule is None else as_schedule(schedule)
        self._own = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or [])
        if self._own and evaluator is not None:
            raise PruningError("give an evaluator, or the optimizer of a loop of your own, not both")
        if self._own:
            self._total_steps()
        self.compactions = self.updates = 0
        self._started = False
        self._weights: list[WeightClaim] = resolve_weights(model, checked_config(config_list))
        super().__init__(
            model, config_list, evaluator, existed_wrappers, scope=scope, schedule=self._given_schedule, **kwargs
        )
        self._fused = bool(existed_wrappers)
        self._layouts = {claim.name: input_layout(model.get_submodule(claim.module)) for claim in self._weights}
        self._remember_dense()
        self._planned = float(self.graph.cost().macs)
        self._optimizers = OptimizersOf(lambda: (t for t in self.parameters.values() if t is not None))
        if self._own:
            self._refuse_unreachable()

    # -- places of masks ---------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, names: Iterable[str], wrappers: Mapping[str, Any]) -> tuple[dict, Any]:
        every = list(dict.fromkeys([*names, *(claim.name for claim in self._weights)]))
        return dict(wrappers), attach_bare(model, every, self.graph.aliases, wrappers)

    def _mask_of(self, name: str) -> Tensor | None:
        return self._targets[name].mask if name in self._targets else super()._mask_of(name)

    def get_masks(self) -> Masks:
        """Return NNI's ``{module: {parameter: mask}}``; after a compaction, of the smaller model."""
        masks: Masks = {}
        for name, space in self._targets.items():
            module, _, parameter = name.rpartition(".")
            masks.setdefault(module, {})[parameter] = None if space.mask is None else space.mask.clone()  # type: ignore[assignment]
        return masks

    def update_masks(self, masks: Any) -> None:
        """Set masks, and what they mask to 0."""
        for module, targets in masks.items():
            for parameter, mask in targets.items():
                space = self._targets.get(f"{module}.{parameter}" if module else parameter)
                if space is not None and space.target is not None:
                    space.mask = None if mask is None else mask.to(space.target)
        self._project()

    def _project(self) -> None:
        project(self._targets.values())

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Tell the pruner of an optimizer step of one's own loop: after ``optimizer.step()``, before ``zero_grad()``.

        Raises
        ------
        PruningError
            The pruner has an evaluator, which tells it; or gradients are needed and gone.
        """
        if self.evaluator is not None:
            raise PruningError("an evaluator trains this model; step() is for a training loop of one's own")
        self._after_step()

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if self.finished:
            return
        self._refuse_unknown_duration(evaluator)
        self._refuse_unreachable()
        self._optimizers.watch()
        self._start()
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])

    def _fuse_postprocess(self, evaluator: Any) -> None:
        self._optimizers.stop()
        if not self.finished and self._total is not None and self._step < self._total:
            _logger.warning(
                "HybridPruner: training ended after %d of %d steps; compress() again goes on", self._step, self._total
            )

    def _after_step(self) -> None:
        self._step += 1
        if self.finished and not self.exploration.lasting:
            self._project()
            return
        self._look_for_duration()
        if not self._started:
            self._start()
        schedule = self._active_schedule()
        time = schedule.time_at(self._step)
        if time is not None:
            self.prune(schedule.fraction(time))
        if self._step % self._interval() == 0 or self._step in self._ends():
            self._explore()
        self._project()
        if time is not None and self._compact_at and not self._distributed():
            saved = 1 - self.plan.cost().macs / max(self._planned, 1)  # what could not go then is not tried again
            if saved >= self._compact_at or (saved > 0 and time == schedule.times):
                self.compact()
        self.finished = self._step >= self._total_steps()

    @torch.no_grad()
    def _start(self) -> None:
        """The first masks of single weights: the largest."""
        if self._started or self._total is None:
            return
        self._started = True
        self._set_weights(self.exploration.masks(self._layers(), None, self._step, self._total))
        self._project()

    def _layers(self) -> dict[str, Layer]:
        """What single weights are chosen of."""
        layers = {}
        for claim in self._weights:
            space = self._targets.get(claim.name)
            if space is not None and space.target is not None and space.target.dim() > 1:
                alive = {dim: torch.as_tensor(kept) for dim, kept in self.plan.dimensions(claim.name).items()}
                layers[claim.name] = Layer(space.target, space.mask, alive, self._layouts[claim.name])
        return layers

    def _distributed(self) -> bool:
        group = torch.distributed
        return self._fused or (group.is_available() and group.is_initialized() and group.get_world_size() > 1)

    # -- when --------------------------------------------------------------------------------------------------------

    def _active_schedule(self) -> Schedule:
        changed = (self.interval_steps, self.total_times) != (self.schedule.interval_steps, self.schedule.times)
        if self._given_schedule is not None or changed or self._total is None:
            return super()._active_schedule()
        ramp = max(1, int(self.ramp_end * self._total_steps()))
        interval = math.ceil(ramp / RAMP_TIMES)
        return Schedule("cubic", ramp // interval, interval, ramp % interval)

    def _trains(self) -> bool:
        return True

    def _interval(self) -> int:
        if self._every is None:
            self._every = max(1, min(100, self._total_steps() // 50))
        return self._every

    def _ends(self) -> tuple[int, ...]:
        """Steps at which the density must be what it is in the end: the last of the ramp, of paying back, of all."""
        paid = max(1, int(PAID_BACK[1] * self._total_steps()))
        return (paid, max(paid, self._active_schedule().total_steps), self._total_steps())

    # -- channels ----------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        """Mean of |w| over all entries that make a unit, summed over its producers."""
        scores = {}
        for group in self.groups:
            weights = [m for m in group.producers if len(self.graph.shapes[m.name]) > 1]
            total = torch.zeros(group.size, dtype=torch.float64)
            for member in weights or group.members:
                space = self._targets.get(member.name)
                if space is None or space.target is None:
                    continue  # a buffer
                value = space.target.detach().abs()
                value = value if space.mask is None else value * space.mask
                entries = max(1, value.numel() * member.indices.shape[1] // value.shape[member.dim])
                total += (member_sums(value, member) / entries).cpu()
            scores[group.name] = total
        return scores

    # -- weights -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _explore(self) -> None:
        """Exchange weights, or fit them to the density and pattern of the end."""
        total, layers = self._total_steps(), self._layers()
        settled = self._step >= self._ends()[1]
        gradients = None
        if self.exploration.exchanged_at(self._step, total) and not (settled and self.exploration.pattern):
            gradients = self._gradients(layers)
        self._set_weights(self.exploration.masks(layers, gradients, self._step, total, settled=settled))
        self.updates += gradients is not None

    def _set_weights(self, masks: Mapping[str, Tensor]) -> None:
        for name, new in masks.items():
            space = self._targets[name]
            weight = space.target
            assert weight is not None
            if space.mask is not None:
                where = start_grown(weight, space.mask, new)
                for optimizer in self._trainers():
                    clear_state(optimizer, weight, where)
            space.mask = new.to(weight)

    def _gradients(self, layers: Mapping[str, Layer]) -> dict[str, Tensor] | None:
        """Gradients by layer; None where one is not finite, as in a step that a GradScaler skips.

        A layer that is frozen, or had no part in this step, has none, and exchanges nothing.
        """
        trained = {name: layer.weight for name, layer in layers.items() if layer.weight.requires_grad}
        found = {name: weight.grad for name, weight in trained.items() if weight.grad is not None}
        if trained and not found:
            name = next(iter(trained))
            raise PruningError(f"{name} has no gradient; call step() after optimizer.step() and before zero_grad()")
        return found if all(torch.isfinite(gradient).all() for gradient in found.values()) else None

    def _trainers(self) -> list[torch.optim.Optimizer]:
        if self._own:
            return self._own
        return list({id(o): o for p in self.bound_model.parameters() for o in self._optimizers.holding(p)}.values())

    # -- live compaction ---------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Take the dead channels out of the model now: parameters shrink in place, and keep their identity.

        Optimizers, their schedules, averages and masks follow. In a distributed run call it on every rank while the
        model is not wrapped by DistributedDataParallel.
        """
        if self._fused:
            raise PruningError("the model is wrapped by another compressor too; unwrap it and run ModelSpeedup")
        tied = {alias for others in self.graph.aliases.values() for alias in others}  # one place under several names
        names = [name for name, space in self._targets.items() if space.mask is not None and name not in tied]
        masks = compact_live(
            self.bound_model, self._dummy_input, self.plan, optimizers=self._trainers(), copies=self.averages,
            masks={name: self._targets[name].mask for name in names}, exact_only=self._exact_only,
        )  # fmt: skip
        self.compactions += 1
        self._rewire(masks)

    def _rewire(self, masks: Mapping[str, Tensor | None]) -> None:
        """Watch the model that is left, and go on with it."""
        model = self.bound_model
        try:
            self._look(model, self.config_list)
        except PruningError as error:  # no channel that could still go
            _logger.info("HybridPruner: %s", error)
            self.resolved = Resolved((), self.resolved.settings, self.resolved.selected)
        known = set(dict(model.named_parameters()))
        self._weights = [claim for claim in self._weights if claim.name in known]
        names = dict.fromkeys([*self._reached(), *masks, *(claim.name for claim in self._weights)])
        held = [name for name in names if name in known]
        self._targets: dict[str, BareTarget] = attach_bare(model, held, self.graph.aliases, {})
        for name, mask in masks.items():
            if name in self._targets and mask is not None and bool((mask == 0).any()):
                self._targets[name].mask = mask
        self._expose_settings()
        self.plan = Plan(self.graph, {name: ~gone for name, gone in self._dead_units().items()})
        self._planned = float(self.plan.cost().macs)

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _record(self) -> dict[str, Any]:
        """What was taken out of the model so far."""
        from nni_plugins.speedup.record import record_of

        return record_of(self.bound_model) or {}

    @_record.setter
    def _record(self, record: Mapping[str, Any]) -> None:
        """The model has it from :meth:`load_state_dict`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. The model is made as small as it was: load its weights, and the optimizer's state, after.

        Parameters
        ----------
        state : mapping
            From ``state_dict`` of a HybridPruner of the same configuration.

        Raises
        ------
        PruningError
            The state is of another class, or does not fit the model.
        """
        from nni_plugins.speedup.record import restore

        own = isinstance(state, Mapping) and state.get("pruner") == type(self).__name__ and "attributes" in state
        record = state["attributes"].get("_record") if own else None
        if record and not self._record:
            for model in (self.bound_model, *map(averaged, self.averages)):
                restore(model, {key: dict(v) if isinstance(v, dict) else v for key, v in record.items()})
            saved = {
                f"{module}.{name}" if module else name: mask
                for module, targets in state["masks"].items()
                for name, mask in targets.items()
            }
            self._rewire(saved)
        super().load_state_dict(state)
