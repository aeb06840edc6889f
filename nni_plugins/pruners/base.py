"""What every pruner of channel groups shares: watching, wrapping, masks, NNI's compress and fusion.

A method is a subclass with a ``_scores`` (how important is a unit). Selection under a budget is in
:mod:`~nni_plugins.pruners.select`, the schedule in :mod:`~nni_plugins.pruners.schedule`.
"""

from __future__ import annotations

import inspect
import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.config import default_config_schema, trans_legacy_config_list
from torch import Tensor, nn

from nni_plugins.channels import ChannelGraph, ChannelGroup, Plan
from nni_plugins.channels.plan import mask_of
from nni_plugins.pruners.chain import SCOPES
from nni_plugins.pruners.checkpoint import Checkpointed
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.schedule import Schedule, as_schedule
from nni_plugins.pruners.scope import make_pools, neighbourhoods, resolve
from nni_plugins.pruners.select import TARGETS, select
from nni_plugins.pruners.wrapping import attach_targets

if TYPE_CHECKING:
    from nni.compression.base.wrapper import ModuleWrapper
    from nni.compression.utils.evaluator import Evaluator

_logger = logging.getLogger(__name__)
Masks = dict[str, dict[str, Tensor]]


class GroupPruner(Checkpointed, Pruner):
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
    scope : {'local', 'global', 'isomorphic'}
        Rank units within a group, over all of them, or within groups of the same neighbourhood.
    target : {'channels', 'macs', 'params'}
        What the sparsity is a fraction of.
    round_to : int
        The channels kept are a multiple of this.
    exact_only : bool
        Leave out groups whose removal does not equal their masking (across LayerNorm, softmax ...).
    normalise : {'mean', 'l2', 'max', None}, optional
        How the scores of different groups are made comparable; the method's own by default.
    schedule : Schedule, str or dict, optional
        When to prune: one shot by default.
    tolerance : float
        How far from the budget, as a fraction of the dense cost, is near enough.

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

    fusible = True
    default_normalise: str | None = "mean"
    needs_training = False
    _kept_state = ("scores", "_kept_units")

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
    ):
        _check("scope", scope, SCOPES)
        _check("target", target, TARGETS)
        if isinstance(round_to, bool) or not hasattr(round_to, "__index__") or round_to < 1:
            raise PruningError(f"round_to is {round_to!r}; it must be a whole number, at least 1")
        if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
            raise PruningError(f"tolerance is {tolerance!r}; it must be a number, at least 0")
        self.scope, self.target, self.round_to, self.tolerance = scope, target, round_to, tolerance
        self.normalise = self.default_normalise if normalise == "default" else normalise
        self.schedule = as_schedule(schedule)
        self.scores: dict[str, Tensor] = {}
        self.finished = False
        self._step = 0
        # read and set by NNI's LinearPruner and AGPPruner
        self.interval_steps, self.total_times = self.schedule.interval_steps, self.schedule.times

        asked = _checked_config(config_list)
        self.graph = ChannelGraph.watch(model, _dummy_input(dummy_input, evaluator))
        self.resolved = resolve(model, asked, self.graph, exact_only=exact_only)
        self._classes = neighbourhoods(model, self.graph)
        names = {
            m.name: None for c in self.resolved.claims for m in c.group.members if not self.graph.is_buffer[m.name]
        }
        wrappers, self._targets = attach_targets(model, self.graph, names, existed_wrappers or {})
        # NNI would look the selected modules up by class name; their targets are made already
        super().__init__(model, [], evaluator, wrappers)
        self.config_list = asked
        self._expose_settings()
        self.plan = Plan(self.graph, {name: ~gone for name, gone in self._dead_units().items()})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show in each method's signature the keyword arguments that it passes on to this class."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__).parameters
        if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in own.values()):
            shared = inspect.signature(GroupPruner.__init__).parameters
            named = [item for name, item in own.items() if name not in ("self", "kwargs")]
            rest = [v for k, v in shared.items() if v.kind is inspect.Parameter.KEYWORD_ONLY and k not in own]
            cls.__signature__ = inspect.Signature([*named, *rest])

    @classmethod
    def from_compressor(cls, compressor: Any, new_config_list: list[dict], *args: Any, **kwargs: Any) -> Any:
        """Make this pruner on a model that ``compressor`` has wrapped, and fuse with it; see nni's ``Compressor``."""
        new = super().from_compressor(compressor, new_config_list, *args, **kwargs)
        for other in new.fused_compressors[1:]:
            if not (new.fusible and getattr(other, "fusible", True)):
                blunt = new if not new.fusible else other
                raise PruningError(f"{type(blunt).__name__} trains several times and cannot be fused; run it by itself")
        return new

    # -- what a method gives -------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        """Importance of each unit of each group of ``self.groups``: float [size] by group name."""
        raise NotImplementedError

    def _watch_training(self, evaluator: Evaluator) -> None:
        """Register on the evaluator what the method must see of the training."""

    # -- what a method uses --------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[ChannelGroup]:
        """The groups that the configuration asks to prune, in forward order."""
        return [claim.group for claim in self.resolved.claims]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live tensors of the groups' parameters, by their full name; masks are not applied."""
        return {name: space.target for name, space in self._targets.items() if space.target is not None}

    @property
    def _kept_units(self) -> dict[str, list[int]]:
        """The plan as plain numbers, for checkpoints."""
        return {name: units.tolist() for name, units in self.plan.kept.items()}

    @_kept_units.setter
    def _kept_units(self, kept: dict[str, list[int]]) -> None:
        self.plan = Plan(self.graph, kept)

    def prune(self, fraction: float = 1.0) -> Masks:
        """Score, select and set masks so that ``fraction`` of the asked sparsity is removed; return the masks."""
        self.scores = _same_on_all_ranks(self._scores())
        kept = self._select({name: score.detach().cpu().numpy() for name, score in self.scores.items()}, fraction)
        self.plan = Plan(self.graph, kept)
        masks: Masks = {}
        for name, dims in self.plan.slices().items():
            for alias in (name, *self.graph.aliases.get(name, ())):
                space = self._targets.get(alias)
                if space is None or space.target is None:
                    continue  # a buffer, or a group that an earlier pruner has masked
                old = torch.ones_like(space.target) if space.mask is None else space.mask
                mask = mask_of(space.target.detach(), dims) * old
                masks.setdefault(space._wrapper.name, {})[space._target_name] = mask
        self.update_masks(masks)
        return masks

    def _select(self, scores: dict[str, np.ndarray], fraction: float) -> dict[str, np.ndarray]:
        """Keep masks by group name; short of the final sparsity, a budget that is missed is no error."""
        current = self._current_settings(fraction)
        final = self._asked_settings()
        return select(
            self.graph,
            make_pools(self.resolved, current, scope=self.scope, classes=self._classes),
            scores,
            target=self.target,
            round_to=self.round_to,
            normalise=self.normalise,
            dead=self._dead_units(),
            tolerance=self.tolerance,
            strict=all((current[name]["sparse_ratio"] or 0) >= (final[name] or 0) for name in current),
        )

    def _refuse_unreachable(self) -> None:
        """Raise before any training where no scores could meet the budget."""
        try:
            self._select({group.name: np.ones(group.size) for group in self.groups}, 1.0)
        except BudgetError as error:
            if error.reachable < error.asked:
                raise

    # -- NNI's life of a compressor ------------------------------------------------------------------------------

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Prune the model.

        Parameters
        ----------
        max_steps, max_epochs : int, optional
            How long to train while pruning; by default as long as the method and its schedule need, which
            for one shot without training is not at all; less what a checkpoint has done already.

        Returns
        -------
        model : torch.nn.Module
            The model, wrapped under its masks; ``unwrap_model()`` takes the wrappers off.
        masks : dict
            NNI's ``{module: {parameter: mask}}``, 1 where kept.
        """
        return super().compress(max_steps, max_epochs)

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is None and max_epochs is None:
            if self.finished:
                _logger.info("%s has finished; compress() does nothing more", type(self).__name__)
                return
            if not self._trains():
                self.prune()
                self.finished = True
                return
            max_steps = self._total_steps() - self._step
        if self.evaluator is None:
            raise PruningError(
                f"{type(self).__name__} needs an evaluator to train for {max_steps or max_epochs} steps or epochs"
            )
        super()._fusion_compress(max_steps, max_epochs)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        if self.finished:
            return
        if not self._trains():
            self.prune()
            self.finished = True
            return
        self._refuse_unreachable()
        self._watch_training(evaluator)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if not self.finished:
            _logger.warning(
                "%s: training ended after %d of %d steps; masks are made from what was seen",
                type(self).__name__, self._step, self._total_steps(),
            )  # fmt: skip
            self.prune()
            self.finished = True

    def _after_step(self) -> None:
        if self.finished:
            return
        self._step += 1
        schedule = self._active_schedule()
        time = schedule.time_at(self._step)
        if time is not None:
            self.prune(schedule.fraction(time))
            self.finished = time == schedule.times

    def _active_schedule(self) -> Schedule:
        """The pruner's schedule, or the steps that NNI's LinearPruner or AGPPruner has set on it."""
        if (self.interval_steps, self.total_times) == (self.schedule.interval_steps, self.schedule.times):
            return self.schedule
        return Schedule("one_shot", self.total_times, self.interval_steps)

    def _trains(self) -> bool:
        schedule = self._active_schedule()
        return self.needs_training or schedule.times > 1 or schedule.start_step > 0

    def _total_steps(self) -> int:
        return self._active_schedule().total_steps if self._trains() else 0

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
        spaces = {
            f"{name}.{target}" if name else target: space
            for name, wrapper in self._module_wrappers.items()
            for target, space in wrapper.pruning_target_spaces.items()
        }
        dead = {}
        for group in self.graph.groups:
            makers = [m for m in group.members if m.role == "out" and not m.parameter.endswith("bias")]
            if (
                not group.prunable
                or not makers
                or any(m.name not in spaces or spaces[m.name].mask is None for m in makers)
            ):
                continue
            gone = np.ones(group.size, dtype=bool)
            for member in makers:
                mask = spaces[member.name].mask
                empty = (mask.movedim(member.dim, 0).reshape(mask.shape[member.dim], -1) == 0).all(dim=1).cpu().numpy()
                gone &= empty[member.indices].all(axis=1)
            if gone.any() and not gone.all():
                dead[group.name] = gone
        return dead


def _checked_config(config_list: Any) -> list[dict]:
    """A copy of the configuration in NNI's present form, checked by NNI's schema: one line on what it refuses."""
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(entry, dict) for entry in config_list):
        raise PruningError(
            "config_list must be a list of dictionaries, such as [{'op_types': [...], 'sparse_ratio': 0.5}]"
        )
    # a legacy entry that only excludes has been written into the others by then, and asks for nothing itself
    translated = trans_legacy_config_list(deepcopy(list(config_list)))
    asked = [entry for entry, given in zip(translated, config_list, strict=True) if not given.get("exclude")]
    for index, entry in enumerate(asked):
        for key in ("sparse_ratio", "sparse_threshold"):
            if type(entry.get(key)) is int:
                entry[key] = float(entry[key])
        try:
            default_config_schema("pruning").validate(entry)
        except Exception as error:  # of the package schema, which tells it in several lines
            raise PruningError(f"config_list[{index}]: {' '.join(str(error).split())}") from None
    return asked


def _check(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        raise PruningError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _dummy_input(given: Any, evaluator: Evaluator | None) -> Any:
    if given is not None:
        return given
    found = None
    if evaluator is not None:
        # LightningEvaluator would make one from a batch, targets included: its inputs come first
        found = getattr(evaluator, "dummy_input", None)
        if found is None and hasattr(evaluator, "data_module"):
            found = evaluator.get_dummy_input()
            found = found[0] if evaluator._dummy_input is None and isinstance(found, (list, tuple)) else found
    if found is None:
        raise PruningError("no dummy_input is known; give dummy_input=… to the pruner, or to its evaluator")
    return found


def _same_on_all_ranks(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average the scores over the processes of a distributed run, so that all of them choose the same units."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for score in scores.values():
            torch.distributed.all_reduce(score)
            score /= torch.distributed.get_world_size()
    return scores
