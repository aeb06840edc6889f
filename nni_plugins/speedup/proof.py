"""The proof: the compact model is held against the masked one; what makes it wrong is found by halving and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Cause
from nni_plugins.speedup import fold
from nni_plugins.speedup.double import GROWS, PICKS, errors_in_double
from nni_plugins.speedup.masked_run import joined, masks_in_force
from nni_plugins.speedup.report import SpeedupReport
from nni_plugins.speedup.step import Step
from nni_plugins.speedup.verify import draws_random_numbers, largest_error, outputs_of, tolerance_of

#: How often what makes a model wrong is looked for by trying without some, before all that is suspected is put back.
_TRIES = 40


class Proof:
    """Holds compact models against the masked one.

    Parameters
    ----------
    model
        The model, which a step has made smaller.
    masks
        The masks that are carried out, by parameter.
    report
        Where the errors go, and what was put back.
    compact
        Makes the model smaller again, by another graph; called after the step before was undone.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, torch.Tensor],
        report: SpeedupReport,
        compact: Callable[[ChannelGraph], Step],
    ) -> None:
        self._model = model
        self._masks = dict(masks)
        self._report = report
        self._compact = compact
        self._double_errors: tuple[float, float] | None = None

    def hold(self, step: Step, inputs: Any, expected: list[torch.Tensor]) -> bool:
        """Hold the compact model against the masked one, and put back what is wrong.

        Returns whether nothing can be said, because the forward draws random numbers.
        """
        wrong = self._wrong(step, inputs, expected)
        drawn = wrong and draws_random_numbers(self._model, inputs)
        if wrong and not drawn:
            self._put_wrong_ones_back(step, inputs, expected)
        outputs = outputs_of(self._model, inputs)
        self._report.max_error, self._report.relative_error = largest_error(outputs, expected)
        if self._double_errors is not None:
            self._report.max_error, self._report.relative_error = self._double_errors
            real = step.compaction.plan.graph.trace.data == "real"
            self._report.inexact.append(PICKS if real else GROWS)
        if drawn:
            self._report.max_error = self._report.relative_error = None
        return drawn

    def _wrong(self, step: Step, inputs: Any, expected: list[torch.Tensor]) -> bool:
        """Whether the outputs differ by more than rounding, and by more than what cannot be folded exactly explains.

        Where constants were folded inexactly, the compact model without them is held against the model in which all
        that the plan removes is masked, norms and consumers too: these must be equal.
        """
        self._double_errors = None
        limit = tolerance_of(self._model, expected)
        if largest_error(outputs_of(self._model, inputs), expected)[1] <= limit:
            return False
        if step.replacement is None and self._equal_in_double(step, inputs, limit):
            return False
        if not self._report.inexact:
            return True
        plan = step.compaction.plan
        if not plan.exact or step.replacement is not None:
            return False  # that removing is not masking was asked for, or others did a part of it
        fold.remove(self._model, step.folded)
        bare = outputs_of(self._model, inputs)
        with step.compaction.suspended():
            masks = joined(self._masks, plan.masks(self._model), plan.graph)
            with masks_in_force(self._model, masks, plan.graph):
                wanted = outputs_of(self._model, inputs)
        step.folded = fold.apply(self._model, step.constants)
        return largest_error(bare, wanted)[1] > limit

    def _equal_in_double(self, step: Step, inputs: Any, limit: float) -> bool:
        found = errors_in_double(self._model, inputs, self._masks, step.compaction, step.folded, step.constants)
        if found is None:
            return False
        errors, step.folded = found
        self._double_errors = errors if errors[1] <= limit else None
        return self._double_errors is not None

    def _put_wrong_ones_back(self, step: Step, inputs: Any, expected: list[torch.Tensor]) -> None:
        """Right shapes can hide a wrong model: find the groups and blocks that make it so by halving; put them back."""
        whole = step.compaction.plan.graph
        blocks = {f"block {name}": name for name in step.compaction.plan.blocks}

        def wrong_without(frozen: Sequence[str]) -> bool:
            step.undo()
            labels = [
                (whole.labels_of(name), Cause(name, "", "the outputs differ")) for name in frozen if name not in blocks
            ]
            graph = whole.without_blocks({blocks[name]: "the outputs differ" for name in frozen if name in blocks})
            step.become(self._compact(graph.without(labels) if labels else graph))
            return self._wrong(step, inputs, expected)

        names = [*step.compaction.plan.kept, *blocks]
        tries = 0

        def wrong_among(suspects: list[str]) -> list[str]:
            nonlocal tries
            tries += 1
            if tries > _TRIES:
                return suspects
            if not wrong_without([n for n in names if n not in suspects]):
                return []
            if len(suspects) == 1:
                return suspects
            middle = len(suspects) // 2
            return wrong_among(suspects[:middle]) + wrong_among(suspects[middle:])

        wrong = wrong_among(names)
        if wrong_without(wrong):  # they are wrong only together
            wrong = names
            wrong_without(wrong)
        lines = [f"{name}: the compact model's output differed from the masked model's" for name in wrong]
        self._report.put_back = list(dict.fromkeys([*self._report.put_back, *lines]))
