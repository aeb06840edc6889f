"""Learning rates as functions of the step alone: nothing to save, nothing that an added parameter group can break."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from nni_plugins.training.sections import TrainSettings


def _cosine(done: float, settings: TrainSettings) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _step(done: float, settings: TrainSettings) -> float:
    return settings.gamma ** bisect.bisect_right(sorted(settings.milestones), done)


def _constant(done: float, settings: TrainSettings) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, TrainSettings], float]] = {
    "cosine": _cosine,
    "step": _step,
    "constant": _constant,
}


def factor(settings: TrainSettings, step: int, total: int, steps_per_epoch: int) -> float:
    """Return the share of the peak learning rate at a step.

    Parameters
    ----------
    settings
        ``schedule``, ``warmup_epochs``, ``milestones`` and ``gamma``.
    step
        Steps done, from 0.
    total
        Steps of the whole training.
    steps_per_epoch
        To count the warm-up, which takes at most half of the training.
    """
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule]((step - warmup) / max(1, total - warmup), settings)
