"""Lottery tickets: train, prune, go back to an early step, train again; round after round.

Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019; Frankle et al., Linear Mode Connectivity, ICML 2020
(rewinding to step k); Renda et al., Comparing Rewinding and Fine-tuning, ICLR 2020 (learning-rate rewinding).
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nni_plugins.pruners.config import check_choice, check_whole, checked_config, dummy_input_of
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.evaluators import optimizers_of, schedulers_of, usual_duration
from nni_plugins.pruners.life import Masks, PrunerBase
from nni_plugins.pruners.rewinding import Snapshot, key_of

_logger = logging.getLogger(__name__)


class LotteryTicketPruner(PrunerBase):
    """Iterative magnitude pruning with rewinding.

    Trains the model; then, in each round, prunes a fraction of what is left by magnitude, goes back to ``rewind_step``
    and trains on from there, until the asked sparsity is reached and trained. Every training is the evaluator's own, on
    optimizers and schedulers made anew. It cannot be fused with other compressors.

    Going back restores weights, norm buffers, the optimizers' memory and settings, and the schedulers that the
    evaluator knows (TorchEvaluator's ``lr_schedulers``, Lightning's, transformers'). A learning rate that a training
    function sets by itself is found out in the first training; then each round runs the first ``rewind_step`` steps
    again, and goes back after them. What cannot be restored, since it is inside the training function: the order of
    the data, the state of random numbers, and a GradScaler.

    Parameters
    ----------
    model : torch.nn.Module
        Model to train.
    config_list : list of dict
        NNI's; the sparsity of the last round.
    evaluator : nni Evaluator
        Trains.
    total_steps : int, optional
        Optimizer steps of one whole training; by default those given to ``compress``, or what a Lightning or
        transformers trainer is set to.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    by : {'weights', 'groups'}
        Prune single weights, or units of channel groups.
    rewind : {'weights', 'learning_rate', None}
        Go back with everything; keep the weights and go back with the learning rate and its schedule only, with a
        fresh optimizer; or do not go back, and train anew from where it is.
    rewind_step : int
        Optimizer steps after which the state is taken; 1 to 7% of training is usual, and 0 fails on larger nets.
    fraction : float
        Of what is left, that a round removes.
    rounds : int, optional
        Instead of ``fraction``: how many rounds there are.
    **kwargs
        Those of :class:`~nni_plugins.pruners.weight_magnitude.MagnitudeWeightPruner`, or with ``by='groups'`` of
        :class:`~nni_plugins.pruners.magnitude.MagnitudePruner`. ``scope`` is 'global' by default.

    Attributes
    ----------
    pruner : MagnitudeWeightPruner or MagnitudePruner
        What chooses.
    rounds : int
        Rounds of pruning; there is one training more.
    round : int
        The present one; 0 while the dense model trains.

    Examples
    --------
    >>> pruner = LotteryTicketPruner(model, [{'op_types': ['Conv2d'], 'sparse_ratio': 0.9}], evaluator, rewind_step=200)
    >>> model, masks = pruner.compress(max_steps=10000)     # 12 trainings
    """

    fusible = False
    needs_training = True
    _kept_state = ("round", "_round_step", "_length", "_replay", "_rates", "_snapshot", "_kept", "_pruner_state")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any,
        total_steps: int | None = None,
        existed_wrappers: Any = None,
        *,
        by: str = "weights",
        rewind: str | None = "weights",
        rewind_step: int = 0,
        fraction: float = 0.2,
        rounds: int | None = None,
        dummy_input: Any = None,
        scope: str = "global",
        **kwargs: Any,
    ):
        check_choice("by", by, ("weights", "groups"))
        check_choice("rewind", rewind, ("weights", "learning_rate", None))
        if evaluator is None:
            raise PruningError("LotteryTicketPruner trains several times, so it needs an evaluator")
        check_whole("total_steps", total_steps, optional=True)
        check_whole("rewind_step", rewind_step, 0)
        check_whole("rounds", rounds, optional=True)
        if total_steps is not None and rewind_step >= total_steps:
            raise PruningError(
                f"rewind_step is {rewind_step}, and a training has {total_steps} steps; it must be fewer"
            )
        if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise PruningError(f"fraction is {fraction!r}; it must be above 0 and below 1")
        self.by, self.rewind, self.rewind_step, self.total_steps = by, rewind, rewind_step, total_steps
        self._begin(None)
        self.pruner = self._make_pruner(model, config_list, evaluator, existed_wrappers, dummy_input, scope, kwargs)
        self.pruner.unwrap_model()
        super().__init__(model, [], evaluator, self.pruner._module_wrappers)
        self.pruner._is_wrapped = True  # by this one
        self.config_list, self._target_spaces = self.pruner.config_list, self.pruner._target_spaces
        self._sparsity = _largest_ratio(self.config_list)
        self.rounds, self._removed = self._plan_rounds(fraction, rounds)
        self.round = self._round_step = 0
        self._length: int | None = total_steps
        self._replay: bool | None = None
        self._rates: list[float] = []
        self._snapshot, self._kept = Snapshot(), Snapshot()
        self._restored: set[str] = set()

    def _make_pruner(
        self, model: Any, config: Any, evaluator: Any, wrappers: Any, dummy: Any, scope: str, kwargs: dict[str, Any]
    ) -> Any:
        if self.by == "groups":
            from nni_plugins.pruners.magnitude import MagnitudePruner

            shown = dummy_input_of(dummy, evaluator)
            return MagnitudePruner(model, config, evaluator, wrappers, dummy_input=shown, scope=scope, **kwargs)
        from nni_plugins.pruners.weight_magnitude import MagnitudeWeightPruner

        if kwargs.get("density") not in (None, "global") and scope == "global":
            scope = "local"
        return MagnitudeWeightPruner(model, config, evaluator, wrappers, scope=scope, **kwargs)

    def _plan_rounds(self, fraction: float, rounds: int | None) -> tuple[int, list[float]]:
        """How many rounds there are, and which fraction of the final sparsity is gone after each."""
        if self._sparsity is None or self._sparsity == 0:
            return 1, [1.0]
        if rounds is None:
            rounds = max(1, math.ceil(math.log(1 - self._sparsity) / math.log(1 - fraction) - 1e-9))
        else:
            fraction = 1 - (1 - self._sparsity) ** (1 / rounds)
        gone = [1 - (1 - fraction) ** (index + 1) for index in range(rounds)]
        return rounds, [min(1.0, value / self._sparsity) for value in gone[:-1]] + [1.0]

    @property
    def _pruner_state(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    @_pruner_state.setter
    def _pruner_state(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state)

    # -- the life of a ticket -------------------------------------------------------------------------------------

    def prune(self, fraction: float = 1.0) -> Masks:
        """Prune by magnitude so that ``fraction`` of the asked sparsity is removed; return the masks."""
        return self.pruner.prune(fraction)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.finished:
            _logger.info("%s has finished; compress() does nothing more", type(self).__name__)
            return
        if self._length is None and max_steps is None and max_epochs is None:
            max_steps, max_epochs = usual_duration(self.evaluator)
            if max_steps is None and max_epochs is None:
                raise PruningError(
                    "how long a training lasts is not known; give compress(max_steps=…), or total_steps=… to the pruner"
                )
        if max_steps is not None and self.rewind_step >= max_steps:
            raise PruningError(
                f"rewind_step is {self.rewind_step}, and a training has {max_steps} steps; it must be fewer"
            )
        self._length = max_steps or self._length
        while not self.finished:
            self._train_once(max_epochs)
            if self.round == self.rounds:
                self.finished = True
                return
            self.prune(self._removed[self.round])
            self.round, self._round_step = self.round + 1, 0

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if not self.finished:
            raise PruningError("LotteryTicketPruner trains several times and cannot be fused; run it by itself first")

    def _fuse_postprocess(self, evaluator: Any) -> None:
        pass

    def _train_once(self, max_epochs: int | None) -> None:
        """One training: the dense one in round 0, a ticket's in the others."""
        evaluator, fresh = self.evaluator, self._round_step == 0
        evaluator.bind_model(self.bound_model, self._get_param_names_map())
        resumed_later = not fresh and (self._skips or self._round_step > self.rewind_step)
        self._restored = set(self._snapshot.optimizers) if resumed_later else set()
        hook = register_optimizer_step_pre_hook(self._before_optimizer)
        try:
            evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])
            if fresh and self.round == 0:
                self._snapshot.take_tensors(self.bound_model)
            elif fresh:
                self._go_back()
            skipped = self.rewind_step if self._skips else 0
            steps = None if self._length is None else self._length - skipped - self._round_step
            evaluator.train(steps, max_epochs)
        finally:
            hook.remove()
            evaluator.unbind_model()
        self._end_training()

    def _end_training(self) -> None:
        if self.round > 0:
            return
        self._length = self._round_step
        if self._round_step <= self.rewind_step and self.rewind is not None:
            raise PruningError(
                f"training ended after {self._round_step} steps, before one after rewind_step {self.rewind_step}"
            )
        if self.rewind_step and not self._snapshot.optimizers:
            _logger.warning("no optimizer of torch stepped the model; only weights and buffers are gone back to")
        self._replay = len(self._rates) > 1

    @property
    def _skips(self) -> bool:
        """Whether this training begins at ``rewind_step``."""
        return self.round > 0 and self.rewind is not None and not self._replay

    def _go_back(self) -> None:
        """At the start of a round: weights; and what optimizers and schedulers there are already."""
        if self.rewind == "weights":
            self._snapshot.give_tensors(self.bound_model)
        elif self._replay:
            self._kept.take_tensors(self.bound_model)
        if self._skips and self.rewind_step:
            for optimizer in optimizers_of(self.evaluator):
                self._give(optimizer)
            self._snapshot.give_schedulers(self.evaluator)

    def _after_step(self) -> None:
        self._step += 1
        self._round_step += 1
        if self._round_step != self.rewind_step or self.rewind is None:
            return
        if self.round == 0:
            self._snapshot.take_tensors(self.bound_model)
        elif self._replay:
            (self._snapshot if self.rewind == "weights" else self._kept).give_tensors(self.bound_model)

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Runs before every step of every optimizer: takes, or gives back, what belongs to those of the model."""
        if self.rewind is None or self.rewind_step == 0:
            return
        watching = self.round == 0 and self._replay is None
        if not watching and (self.round == 0 or len(self._restored) >= max(len(self._snapshot.optimizers), 1)):
            return
        key = key_of(optimizer, self.bound_model.named_parameters)
        if key is None:
            return
        if watching:
            self._watch_rate(float(optimizer.param_groups[0]["lr"]))
            if self._round_step >= self.rewind_step and key not in self._snapshot.optimizers:
                self._snapshot.take_optimizer(key, optimizer, self.evaluator)
        elif key not in self._restored and (self._skips or self._round_step >= self.rewind_step):
            self._give(optimizer)
            if self._skips and not self._restored:
                self._snapshot.give_schedulers(self.evaluator)
            self._restored.add(key)

    def _watch_rate(self, rate: float) -> None:
        """A learning rate that changes though no scheduler is known is the training function's own doing."""
        if rate not in self._rates and len(self._rates) < 2 and not (self._rates and schedulers_of(self.evaluator)):
            self._rates.append(rate)

    def _give(self, optimizer: torch.optim.Optimizer) -> None:
        key = key_of(optimizer, self.bound_model.named_parameters)
        if key is None:
            return
        memory = self.rewind == "weights"
        if not memory and self._replay:
            optimizer.state.clear()
        self._snapshot.give_optimizer(key, optimizer, memory=memory, rates=not self._replay)


def _largest_ratio(config_list: list[dict]) -> float | None:
    """The highest sparsity that a configuration asks for; None where it gives thresholds only."""
    ratios = []
    for entry in checked_config(config_list):
        targets = entry.get("target_settings", {}).values()
        ratios += [
            setting.get("sparse_ratio") for setting in (entry, *targets) if setting.get("sparse_ratio") is not None
        ]
    return max(ratios, default=None)
