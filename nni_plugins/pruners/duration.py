"""For pruners that must know how long training lasts: from their argument, from compress(), or from a trainer."""

from __future__ import annotations

from typing import Any

from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.evaluators import steps_under_way, usual_duration
from nni_plugins.pruners.life import PrunerBase


class KnownDuration(PrunerBase):
    """Mix-in: ``_total`` is the number of optimizer steps of the whole training, or None as long as it is not known."""

    _kept_state: tuple[str, ...] = ("_total",)
    _total: int | None = None

    def _total_steps(self) -> int:
        if self._total is None:
            raise PruningError(
                "how long training lasts is not known; give compress(max_steps=…), or total_steps=… to the pruner"
            )
        return self._total

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if not self.finished and self._total is None:
            if max_steps is None and max_epochs is None:
                max_steps, max_epochs = usual_duration(self.evaluator)
            self._total = max_steps
            if max_steps is None and max_epochs is None:
                self._total_steps()
        super()._fusion_compress(max_steps, max_epochs)

    def _refuse_unknown_duration(self, evaluator: Any) -> None:
        """Raise before training where the number of steps cannot become known while it runs."""
        if self._total is None and not (hasattr(evaluator, "traced_trainer") or hasattr(evaluator, "data_module")):
            self._total_steps()

    def _look_for_duration(self) -> None:
        """After the first step: ask the trainer that is running."""
        if self._total is None:
            under_way = steps_under_way(self.evaluator)
            self._total = None if under_way is None else self._step - 1 + under_way
