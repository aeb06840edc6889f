"""When units go: the third of the three questions of pruning.

A schedule says at which optimizer steps masks are made, and which fraction of the final sparsity is asked
for at each. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import ceil, isfinite

from nni_plugins.pruners.errors import PruningError

SHAPES: dict[str, Callable[[float], float]] = {
    "one_shot": lambda _: 1.0,
    "linear": lambda time: time,
    "cubic": lambda time: 1.0 - (1.0 - time) ** 3,  # Zhu and Gupta 2017 (AGP)
    "iterative": lambda time: time,
}
"""Fraction of the final sparsity at a time in (0, 1]."""


@dataclass(frozen=True)
class Schedule:
    """When to prune and how much.

    Parameters
    ----------
    shape : {'one_shot', 'linear', 'cubic', 'iterative'}
        How the sparsity grows. All but the last train for an interval and then prune; ``iterative`` prunes and then
        trains for an interval, in equal parts, so that the last pruning is recovered from, too.
    times : int
        How often masks are made; 1 for one shot.
    interval_steps : int
        Optimizer steps between them.
    start_step : int
        Optimizer steps before the first interval begins.
    interval_epochs : float, optional
        In place of ``interval_steps``.
    start_epoch : float
        In place of ``start_step``.
    steps_per_epoch : int, optional
        Optimizer steps of an epoch. Lightning's and transformers' trainers know them; with a ``TorchEvaluator`` they
        are counted in a first epoch of its own, ``train(max_epochs=1)``.
    """

    shape: str = "one_shot"
    times: int = 1
    interval_steps: int = 1
    start_step: int = 0
    interval_epochs: float | None = None
    start_epoch: float = 0.0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("times", "interval_steps", "start_step", "steps_per_epoch"):
            value = getattr(self, name)
            if value is None and name == "steps_per_epoch":
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise PruningError(f"schedule.{name} is {value!r}; it must be a whole number")
        for name in ("interval_epochs", "start_epoch"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
            if value is not None and not number:
                raise PruningError(f"schedule.{name} is {value!r}; it must be a number")
        if self.shape not in SHAPES:
            raise PruningError(f"schedule.shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        if self.times < 1 or self.interval_steps < 1 or self.start_step < 0:
            raise PruningError(
                f"schedule asks for {self.times} times, every {self.interval_steps} steps from step {self.start_step}; "
                "times and interval_steps must be at least 1, start_step at least 0"
            )
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise PruningError(f"schedule.steps_per_epoch is {self.steps_per_epoch}; it must be at least 1")
        if (self.interval_epochs is not None and self.interval_epochs <= 0) or self.start_epoch < 0:
            raise PruningError(
                f"schedule asks for every {self.interval_epochs} epochs from epoch {self.start_epoch}; "
                "interval_epochs must be more than 0, start_epoch at least 0"
            )
        if self.interval_epochs is None and self.start_epoch:
            raise PruningError("schedule.start_epoch is given without interval_epochs; give both, or start_step")
        if self.interval_epochs is not None and (self.interval_steps != 1 or self.start_step):
            raise PruningError("schedule gives steps and epochs; give one of interval_steps and interval_epochs")

    # -- epochs --------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether it is by epochs whose length is not known yet."""
        return self.interval_epochs is not None and self.steps_per_epoch is None

    @property
    def first_epoch(self) -> float:
        """The epoch, from 0, at which the first masks are due."""
        interval = self.interval_epochs or 0.0
        return self.start_epoch + (0.0 if self.shape == "iterative" else interval)

    @property
    def total_epochs(self) -> int:
        """Whole epochs until all is done."""
        return ceil(self.start_epoch + self.times * (self.interval_epochs or 0.0) - 1e-9)

    def with_epochs_of(self, steps: int) -> Schedule:
        """The schedule with the length of an epoch, in steps."""
        return replace(self, steps_per_epoch=steps)

    def _after(self, intervals: int) -> int:
        """The optimizer step, from 1, after which so many intervals are over."""
        if self.interval_epochs is None:
            step = self.start_step + intervals * self.interval_steps
        elif self.steps_per_epoch is None:
            raise PruningError(
                "the schedule is by epochs, and how many steps an epoch has is not known; give it steps_per_epoch"
            )
        else:
            step = ceil((self.start_epoch + intervals * self.interval_epochs) * self.steps_per_epoch - 1e-9)
        late = self.shape == "iterative" and self.start_step == 0 and self.start_epoch == 0
        return step + late  # masks are made after a step

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether it needs training, whatever the method."""
        return self.times > 1 or self.start_step > 0 or self.interval_epochs is not None or self.shape == "iterative"

    def due_step(self, time: int) -> int:
        """After which optimizer step (from 1) the ``time``-th masks are made (from 1 to ``times``)."""
        return self._after(time - 1 if self.shape == "iterative" else time)

    @property
    def total_steps(self) -> int:
        """Optimizer steps until the last masks are made, and recovered from."""
        return self._after(self.times)

    def time_at(self, step: int) -> int | None:
        """Which of the ``times`` is due after optimizer step ``step`` (from 1), or None."""
        return next((time for time in range(self.times, 0, -1) if self.due_step(time) == step), None)

    def next_due(self, step: int) -> int | None:
        """The next step after ``step`` at which masks are made, or None."""
        return next((due for due in map(self.due_step, range(1, self.times + 1)) if due > step), None)

    def fraction(self, time: int) -> float:
        """Fraction of the final sparsity asked for at the ``time``-th pruning (from 1 to ``times``)."""
        return SHAPES[self.shape](time / self.times)


def as_schedule(schedule: Schedule | str | dict | None) -> Schedule:
    """A schedule from itself, a shape's name, or its fields as a dictionary."""
    if schedule is None:
        return Schedule()
    if isinstance(schedule, str):
        return Schedule(shape=schedule)
    if isinstance(schedule, dict):
        known = [field.name for field in fields(Schedule)]
        for name in schedule:
            if name not in known:
                raise PruningError(f"schedule has no field {name!r}; known: {', '.join(known)}")
        return Schedule(**schedule)
    if not isinstance(schedule, Schedule):
        raise PruningError(
            f"schedule is {schedule!r}; it must be a Schedule, one of {', '.join(SHAPES)}, or its fields"
        )
    return schedule
