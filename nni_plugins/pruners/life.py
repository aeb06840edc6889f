"""The life that all pruners share: when they prune, NNI's compress and fusion, and their state.

What a pruner masks is its subclass's business: :class:`~nni_plugins.pruners.base.GroupPruner` masks units of channel
groups, :class:`~nni_plugins.pruners.weights.WeightPruner` single weights.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from nni.compression.base.compressor import Pruner
from torch import Tensor, nn

from nni_plugins.pruners.checkpoint import Checkpointed
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.evaluators import knows_epochs, steps_per_epoch
from nni_plugins.pruners.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from nni.compression.utils.evaluator import Evaluator

_logger = logging.getLogger(__name__)
Masks = dict[str, dict[str, Tensor]]
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_GIVEN_BY_NNI = ("self", "model", "config_list", "evaluator", "existed_wrappers")


class PrunerBase(Checkpointed, Pruner):
    """Base of all pruners.

    A subclass calls ``_begin(schedule)`` before NNI's constructor, and gives ``prune(fraction)``.

    Attributes
    ----------
    schedule : Schedule
        When to prune.
    finished : bool
        The masks are final; run again, the pruner does nothing.
    fusible : bool
        Whether the method can be fused with other compressors by ``from_compressor``.
    """

    fusible = True
    needs_training = False
    _kept_state: tuple[str, ...] = ("_epoch_steps",)
    _counting = False

    def _begin(self, schedule: Schedule | str | dict | None) -> None:
        self.schedule = as_schedule(schedule)
        self.finished = False
        self._step = 0
        # read and set by NNI's LinearPruner and AGPPruner
        self.interval_steps, self.total_times = self.schedule.interval_steps, self.schedule.times

    @property
    def _epoch_steps(self) -> int | None:
        """Optimizer steps of an epoch, for a schedule by epochs, once they are known."""
        return self.schedule.steps_per_epoch

    @_epoch_steps.setter
    def _epoch_steps(self, steps: int | None) -> None:
        if steps is not None:
            self.schedule = self.schedule.with_epochs_of(steps)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show in each method's signature the keyword arguments that it passes on to its base."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__).parameters
        if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in own.values()):
            bases = (c for c in cls.__mro__[1:] if issubclass(c, PrunerBase) and "__init__" in c.__dict__)
            base = next(bases, None)
            if base is None:
                return
            shared = inspect.signature(base).parameters
            named = [item for name, item in own.items() if name not in ("self", "kwargs")]
            rest = [v for k, v in shared.items() if v.kind is inspect.Parameter.KEYWORD_ONLY and k not in own]
            cls.__signature__ = inspect.Signature([*named, *rest])

    @classmethod
    def from_compressor(cls, compressor: Any, new_config_list: list[dict], *args: Any, **kwargs: Any) -> Any:
        """Make this pruner on a model that ``compressor`` has wrapped, and fuse with it; see nni's ``Compressor``.

        Parameters
        ----------
        compressor : nni Compressor
            What the model is wrapped by; its evaluator is taken over.
        new_config_list : list of dict
            Of this pruner.
        *args, **kwargs
            The method's own, in the order of its constructor (such as ``training_steps``), and last ``evaluator``,
            which counts where ``compressor`` has none.
        """
        own = inspect.signature(cls.__init__).parameters
        names = [n for n, item in own.items() if item.kind is _POSITIONAL and n not in _GIVEN_BY_NNI]
        places = inspect.Signature([inspect.Parameter(name, _POSITIONAL) for name in (*names, "evaluator")])
        given = places.bind_partial(*args).arguments
        new = super().from_compressor(compressor, new_config_list, **given, **kwargs)
        for other in new.fused_compressors[1:]:
            if not (new.fusible and getattr(other, "fusible", True)):
                blunt = new if not new.fusible else other
                raise PruningError(f"{type(blunt).__name__} trains several times and cannot be fused; run it by itself")
        return new

    # -- what a method gives -------------------------------------------------------------------------------------

    def prune(self, fraction: float = 1.0) -> Masks:
        """Make and set masks so that ``fraction`` of the asked sparsity is removed; return them."""
        raise NotImplementedError

    def _refuse_unreachable(self) -> None:
        """Raise before any training what can be known to fail after it."""

    def _watch_training(self, evaluator: Evaluator) -> None:
        """Register on the evaluator what the method must see of the training."""

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
        self._ask_for_epochs()
        if max_steps is None and max_epochs is None:
            if self.finished:
                _logger.info("%s has finished; compress() does nothing more", type(self).__name__)
                return
            if not self._trains():
                self.prune()
                self.finished = True
                return
            if self._trains() and self._active_schedule().waits:
                max_epochs = self.schedule.total_epochs
            else:
                max_steps = self._total_steps() - self._step
        if self.evaluator is None:
            raise PruningError(
                f"{type(self).__name__} needs an evaluator to train for {max_steps or max_epochs} steps or epochs"
            )
        if max_steps is None and max_epochs is not None and self._must_count():
            self._compress_counting(max_epochs)
        else:
            super()._fusion_compress(max_steps, max_epochs)

    def _ask_for_epochs(self) -> None:
        """Learn how many steps an epoch has, where the evaluator knows it, perhaps only while it trains."""
        if self.schedule.waits and self.evaluator is not None:
            self._epoch_steps = steps_per_epoch(self.evaluator)

    def _must_count(self) -> bool:
        """Whether the steps of an epoch can only be counted."""
        return not self.finished and self._active_schedule().waits and not knows_epochs(self.evaluator)

    def _compress_counting(self, epochs: int) -> None:
        """NNI's training for so many epochs, in two parts: the first is one epoch, whose steps are counted."""
        evaluator = self.evaluator
        if min(self.schedule.first_epoch, epochs) < 1:
            raise PruningError(
                f"schedule asks for masks at epoch {self.schedule.first_epoch:g}, before an epoch's steps are counted; "
                "give it steps_per_epoch"
            )
        evaluator.bind_model(self.bound_model, self._get_param_names_map())
        self._counting = True
        try:
            for compressor in self.fused_compressors:
                compressor._fuse_preprocess(evaluator)
        finally:
            self._counting = False
        evaluator.train(None, 1)
        if self._step == 0:
            raise PruningError(f"{type(self).__name__} counted no optimizer step in an epoch; does training step()?")
        self._epoch_steps = self._step
        self._prune_where_due()
        if epochs > 1:
            evaluator.train(None, epochs - 1)
        for compressor in self.fused_compressors:
            compressor._fuse_postprocess(evaluator)
        evaluator.unbind_model()

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        if self.finished:
            return
        if not self._trains():
            self.prune()
            self.finished = True
            return
        if self._must_count() and not self._counting:
            raise PruningError(
                "the schedule is by epochs, and this evaluator does not say how many steps one has; give the schedule "
                "steps_per_epoch, or use compress(max_epochs=…) of this pruner"
            )
        self._refuse_unreachable()
        self._watch_training(evaluator)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if self.finished:
            return
        if self._active_schedule().waits or self._active_schedule().next_due(self._step) is not None:
            total = "more" if self._active_schedule().waits else str(self._total_steps())
            _logger.warning(
                "%s: training ended after %d of %s steps; masks are made from what was seen",
                type(self).__name__, self._step, total,
            )  # fmt: skip
            self.prune()
        self.finished = True

    def _after_step(self) -> None:
        if self.finished:
            return
        self._step += 1
        self._ask_for_epochs()
        if not self._active_schedule().waits:
            self._prune_where_due()

    def _prune_where_due(self) -> None:
        schedule = self._active_schedule()
        time = schedule.time_at(self._step)
        if time is not None:
            self.prune(schedule.fraction(time))
        self.finished = self._step >= schedule.total_steps

    def _active_schedule(self) -> Schedule:
        """The pruner's schedule, or the steps that NNI's LinearPruner or AGPPruner has set on it."""
        if (self.interval_steps, self.total_times) == (self.schedule.interval_steps, self.schedule.times):
            return self.schedule
        return Schedule("one_shot", self.total_times, self.interval_steps)

    def _due_within(self, steps: int) -> bool:
        """Whether masks are made within so many steps from now: what is scored by training is gathered then only."""
        schedule = self._active_schedule()
        if self.finished or schedule.waits:
            return not self.finished
        due = schedule.next_due(self._step)
        return due is not None and due - self._step <= steps

    def _trains(self) -> bool:
        schedule = self._active_schedule()
        return self.needs_training or schedule.trains

    def _total_steps(self) -> int:
        return self._active_schedule().total_steps if self._trains() else 0
