"""Replay: the compact model is watched again, operator by operator, against the sizes that the plan predicts.

The first operator that disagrees names the module whose forward holds a stale size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_plugins.channels.call import Info, Operator, output_tensors
from nni_plugins.channels.labels import Array, Cause, MaybeLabels
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.rules.registry import rule_for
from nni_plugins.channels.watch import StopWatching, run_recorded

#: Operators that say the same: a linear layer with and without a bias, a reshape with and without a copy.
_SAME = {
    "aten.addmm": "aten.mm",
    "aten._unsafe_view": "aten.view",
    "aten._reshape_alias": "aten.view",
    "aten.reshape": "aten.view",
}
#: Copies and aliases, which come and go as strides and caches fall out.
COPIES = frozenset(["aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh"])


@dataclass(frozen=True)
class Mismatch:
    """The first operator at which a replay leaves the prediction.

    Attributes
    ----------
    index
        The operator's place in the run.
    operator
        The watched operator at that place; None where the run went on beyond the watched one.
    why
        What differs, in words.
    """

    index: int
    operator: Operator | None
    why: str

    @property
    def module(self) -> str:
        return self.operator.module if self.operator is not None else ""

    def __str__(self) -> str:
        name = self.operator.name if self.operator is not None else "the end"
        return f"{name} in {self.module or 'the model'}: {self.why}"


class _Stop(StopWatching):
    def __init__(self, mismatch: Mismatch) -> None:
        self.mismatch = mismatch


class Replay:
    """Replays of one plan's compact model; predicted sizes are worked out once.

    Parameters
    ----------
    plan
        The plan that the model was compacted by.
    dummy_input
        The input that the graph was watched with.
    """

    def __init__(self, plan: Plan, dummy_input: Any) -> None:
        self._plan = plan
        self._dummy_input = dummy_input
        self._operators = [op for op in plan.graph.trace.operators if op.name not in COPIES]
        self._kept: dict[int, int] = {}

    def predicted(self, info: Info) -> tuple[int, ...]:
        """Return the shape that a watched tensor has in the compact model."""
        return tuple(self._size(size, labels) for size, labels in zip(info.shape, info.labels, strict=True))

    def _size(self, size: int, labels: MaybeLabels) -> int:
        if labels is None:
            return size
        count = self._kept.get(id(labels))
        if count is None:
            count = self._kept[id(labels)] = int(self._plan.keeps(labels).sum())
        return count

    def run(self, model: nn.Module) -> Mismatch | None:
        """Watch ``model`` and return where it first leaves the prediction, or None."""
        position = 0

        def check(func: Any, args: tuple, kwargs: dict, out: Any, module: str) -> None:
            nonlocal position
            tensors, name = output_tensors(out), rule_for(func)[0]
            if not tensors or name in COPIES:
                return
            if position >= len(self._operators):
                raise _Stop(Mismatch(position, None, "the compact model runs more operators"))
            operator = self._operators[position]
            if _SAME.get(name, name) != _SAME.get(operator.name, operator.name):
                raise _Stop(Mismatch(position, operator, f"the compact model runs {name} here"))
            for tensor, info in zip(tensors, operator.outputs, strict=False):
                wanted = self.predicted(info)
                if tuple(tensor.shape) != wanted:
                    raise _Stop(Mismatch(position, operator, f"its size is {tuple(tensor.shape)}, not {wanted}"))
            position += 1

        try:
            run_recorded(model, self._dummy_input, check, data=self._plan.graph.trace.data)
        except _Stop as stop:
            return stop.mismatch
        except Exception as error:  # whatever a forward raises when a size is not what it expects
            operator = self._operators[position] if position < len(self._operators) else None
            return Mismatch(
                position, operator, str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            )
        if position < len(self._operators):
            return Mismatch(position, self._operators[position], "the compact model runs fewer operators")
        return None

    def changes(self, mismatch: Mismatch) -> dict[int, int]:
        """Return ``{old size: new size}`` of the dimensions that shrink around a mismatch."""
        found: dict[int, int] = {}
        if mismatch.operator is not None:
            for info in [*mismatch.operator.outputs, *mismatch.operator.inputs]:
                for old, new in zip(info.shape, self.predicted(info), strict=True):
                    if old != new:
                        found.setdefault(old, new)
        return found

    def culprits(self, mismatch: Mismatch) -> list[tuple[Array, Cause]]:
        """Return the labels to freeze so that the mismatch cannot come back."""
        if mismatch.operator is None:
            return []
        operator = mismatch.operator
        cause = Cause(operator.module, operator.name, "its forward holds a fixed size")
        disagree = [info for info in operator.outputs if self._differs(info)] or operator.outputs
        arrays = [*_arrays(disagree), *_arrays(operator.inputs)]
        return [(a, cause) for a in arrays if self._size(len(a), a) != len(a)]

    def _differs(self, info: Info) -> bool:
        return self.predicted(info) != info.shape


def _arrays(infos: list[Info]) -> list[Array]:
    return [labels for info in infos for labels in info.labels if labels is not None]
