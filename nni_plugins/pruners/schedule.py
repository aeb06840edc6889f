"""When units go: the third of the three questions of pruning.

A schedule says at which optimizer steps masks are made, and which fraction of the final sparsity is asked
for at each. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from nni_plugins.pruners.errors import PruningError

SHAPES: dict[str, Callable[[float], float]] = {
    "one_shot": lambda _: 1.0,
    "linear": lambda time: time,
    "cubic": lambda time: 1.0 - (1.0 - time) ** 3,  # Zhu and Gupta 2017 (AGP)
}
"""Fraction of the final sparsity at a time in (0, 1]."""


@dataclass(frozen=True)
class Schedule:
    """When to prune and how much.

    Parameters
    ----------
    shape : {'one_shot', 'linear', 'cubic'}
        How the sparsity grows.
    times : int
        How often masks are made; 1 for one shot.
    interval_steps : int
        Optimizer steps between them.
    start_step : int
        Optimizer steps before the first interval begins.
    """

    shape: str = "one_shot"
    times: int = 1
    interval_steps: int = 1
    start_step: int = 0

    def __post_init__(self) -> None:
        for name in ("times", "interval_steps", "start_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise PruningError(f"schedule.{name} is {value!r}; it must be a whole number")
        if self.shape not in SHAPES:
            raise PruningError(f"schedule.shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        if self.times < 1 or self.interval_steps < 1 or self.start_step < 0:
            raise PruningError(
                f"schedule asks for {self.times} times, every {self.interval_steps} steps from step {self.start_step}; "
                "times and interval_steps must be at least 1, start_step at least 0"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps until the last masks are made."""
        return self.start_step + self.times * self.interval_steps

    def time_at(self, step: int) -> int | None:
        """Which of the ``times`` is due after optimizer step ``step`` (from 1), or None."""
        done = step - self.start_step
        if done <= 0 or done % self.interval_steps or done > self.times * self.interval_steps:
            return None
        return done // self.interval_steps

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
