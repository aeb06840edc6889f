"""Replay: the compact model is run without data, operator by operator, against the sizes that the plan predicts.

The first operator that disagrees names the module whose forward holds a stale size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.channels.call import Info, Operator, output_tensors
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.rules.registry import rule_for
from nni_plugins.channels.skeleton import skeleton
from nni_plugins.channels.trace import LITERALS, numbers_of
from nni_plugins.channels.watch import StopWatching, run_recorded

#: Operators that say the same: a linear layer with and without a bias, a reshape with and without a copy.
_SAME = {
    "aten.addmm": "aten.mm",
    "aten._unsafe_view": "aten.view",
    "aten._reshape_alias": "aten.view",
    "aten.reshape": "aten.view",
}

#: Operators that only say in which order dimensions lie: what was right before is right after them. Torch itself takes
#: others (in einsum, in a linear layer) where a size has become 1.
_ORDERS = frozenset(["aten.t", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze"])

#: Operators that torch puts in, or not, as strides fall out; where both runs have one, the sizes must agree.
_VIEWS = frozenset(["aten.view", "aten.expand"])


#: Operators that are told how many groups the channels make, and by which argument.
_GROUPS = {"aten.channel_shuffle": 1, "aten.native_channel_shuffle": 1, "aten.native_group_norm": 6}

#: What is computed with integers as with other numbers.
_ARITHMETIC = frozenset(["aten.mul", "aten.div", "aten.add", "aten.sub", "aten.pow", "aten.rsub"])


def plain_name(operator: str) -> str:
    """Return the name that operators which say the same share."""
    return _SAME.get(operator, operator)


#: Copies and aliases, which come and go as strides and caches fall out.
COPIES = frozenset(
    ["aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.as_strided_"]
)
_PASSED_OVER = COPIES | _ORDERS

#: Torch's own, which say by a tag whether the size of a result depends on values; others (a detector's) may not.
_OWN_OPERATORS = frozenset(["aten", "prims", "prim"])


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
    scaled
        Whether all sizes are right so far, but a number that the forward computes from a size is another one.
    """

    index: int
    operator: Operator | None
    why: str
    scaled: bool = False

    @property
    def module(self) -> str:
        return self.operator.module if self.operator is not None else ""

    def __str__(self) -> str:
        name = self.operator.name if self.operator is not None else "the end"
        return f"{name} in {self.module or 'the model'}: {self.why}"


def _without_ones(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether sizes differ only in how many dimensions of size 1 there are, which no forward writes down."""
    if len(shape) == len(wanted):
        return False
    return [size for size in shape if size != 1] == [size for size in wanted if size != 1]


def _other_number(operator: Operator, args: tuple, kwargs: dict) -> str:
    """Say so where an operator is given another number than in the watched run: a scale made from a size."""
    kinds = (float, int) if operator.name.rstrip("_") in _ARITHMETIC else float
    for before, now in _pairs(operator, args, kwargs):
        numbers = isinstance(before, kinds) and isinstance(now, kinds) and not isinstance(now, bool)
        if numbers and before == before and not math.isclose(before, now, rel_tol=1e-9):  # NaN equals nothing
            return f"it is given {now:.6g}, not {before:.6g}, a number that follows a size"
    return ""


def _pairs(operator: Operator, args: tuple, kwargs: dict) -> list[tuple[Any, Any]]:
    return [*zip(operator.args, args, strict=False), *((operator.kwargs.get(key), kwargs[key]) for key in kwargs)]


def _other_literal(operator: Operator, args: tuple, kwargs: dict, literals: dict[int, Literal]) -> str:
    """Say so where an operator computes with a tensor into which the forward wrote another number: a size, maybe."""
    if not all(info.dtype is not None and info.dtype.is_floating_point for info in operator.outputs):
        return ""  # indices and sizes may follow
    for before, now in _pairs(operator, args, kwargs):
        if isinstance(before, Info) and before.written and id(now) in literals:
            numbers = literals[id(now)][1]
            for a, b in zip(before.written, numbers if len(numbers) == len(before.written) else (), strict=False):
                if a == a and not math.isclose(a, b, rel_tol=1e-6):
                    return f"it is given {b:.6g}, not {a:.6g}, a number that follows a size"
    return ""


_SLICE = ("start", "end", "step")


def _places(size: int, start: int | None, end: int | None, step: int | None) -> np.ndarray:
    """Return the indices that a slice takes."""
    return np.arange(size)[slice(start, end, step)]


class Allowance:
    """How often a plan may still be replayed: a forward that hangs on everything must not take for ever."""

    def __init__(self, runs: int) -> None:
        self.left = runs

    def spend(self) -> None:
        if self.left <= 0:
            raise Spent
        self.left -= 1


class Spent(Exception):
    """No more replays are allowed."""


Literal = tuple[torch.Tensor, tuple[float, ...]]  # the tensor, lest its id be given to another, and what it holds


class _Stop(StopWatching):
    def __init__(self, mismatch: Mismatch | None) -> None:
        self.mismatch = mismatch


class Replay:
    """Replays of one plan, on a skeleton of the compact model; predicted sizes are worked out once.

    Parameters
    ----------
    plan
        What is kept.
    dummy_input
        The input that the graph was watched with.
    skip
        Names of modules that are compact already.
    allowance
        How many runs there may still be.
    """

    def __init__(
        self, plan: Plan, dummy_input: Any, skip: Collection[str] = (), allowance: Allowance | None = None
    ) -> None:
        gone = plan.removal.operators
        self.operators = [
            op
            for place, op in enumerate(plan.graph.trace.operators)
            if op.name not in _PASSED_OVER and not (len(gone) and gone[place])
        ]
        self._plan = plan
        self._dummy_input = dummy_input
        self._skip = skip
        self._allowance = allowance
        self._exact = plan.exact
        self._kept: dict[int, int] = {}

    def predicted(self, info: Info) -> tuple[int, ...]:
        """Return the shape that a watched tensor has in the compact model."""
        return tuple(self.kept(size, labels) for size, labels in zip(info.shape, info.labels, strict=True))

    def kept(self, size: int, labels: MaybeLabels) -> int:
        """Return what is left of a dimension of ``size`` that carries ``labels``."""
        if labels is None:
            return size
        count = self._kept.get(id(labels))
        if count is None:
            count = self._kept[id(labels)] = int(self._plan.keeps(labels).sum())
        return count

    def run(self, model: nn.Module, until: int | None = None) -> Mismatch | None:
        """Run a skeleton of ``model`` and return where it first leaves the prediction, or None.

        It ends after the operator at place ``until``, where that is given.

        Raises
        ------
        Spent
            If there may be no more runs.
        """
        if self._allowance is not None:
            self._allowance.spend()
        position, apart = 0, False  # whether a linear layer's bias, added by its operator, is still to be added
        exact = self._exact
        read = {module: iter(numbers) for module, numbers in self._plan.graph.trace.numbers.items()}
        literals: dict[int, Literal] = {}

        def check(func: Any, args: tuple, kwargs: dict, out: Any, module: str) -> float | None:
            nonlocal position, apart, exact
            tensors, name = output_tensors(out), rule_for(func)[0]
            if isinstance(out, float):  # read from a tensor: from here on, numbers may follow values, not sizes
                exact = False
                return next(read.get(module, iter(())), None)  # so that sizes made from values are those watched
            if name in LITERALS:
                literals[id(out)] = (out, numbers_of(args[0]))
            if not tensors or name in _PASSED_OVER or self._plan.removal.holds(module):
                return None
            if plain_name(name) not in _VIEWS:
                position = self._past_views(position)
            elif not self._is_view(position):
                return None
            if until is not None and position > until:
                raise _Stop(None)
            if position >= len(self.operators):
                raise _Stop(Mismatch(position, None, "the compact model runs more operators"))
            operator = self.operators[position]
            if name == "aten.mul" and self._is_over_one(operator, tensors[0].numel()):
                position += 1
                return None
            if apart and name.startswith("aten.add"):
                apart = False
                return None
            if plain_name(name) not in _VIEWS:
                apart = name == "aten.mm" and operator.name == "aten.addmm"
            if plain_name(name) != plain_name(operator.name):
                raise _Stop(Mismatch(position, operator, f"the compact model runs {name} here"))
            _as_many_as_watched(func, tensors, operator)
            for tensor, info in zip(tensors, operator.outputs, strict=False):
                wanted = self.predicted(info)
                if tuple(tensor.shape) != wanted and not _without_ones(tensor.shape, wanted):
                    raise _Stop(Mismatch(position, operator, f"its size is {tuple(tensor.shape)}, not {wanted}"))
            if why := self._other_start(operator, args) or self._other_groups(operator, args):
                raise _Stop(Mismatch(position, operator, why))
            if exact and (
                why := _other_number(operator, args, kwargs) or _other_literal(operator, args, kwargs, literals)
            ):
                raise _Stop(Mismatch(position, operator, why, scaled=True))
            for tensor, decided in zip(tensors, operator.decided, strict=False):
                if decided is not None and decided.shape == tensor.shape:
                    tensor.copy_(decided)  # so that the forward goes the same way, which tokens an expert gets too
            position += 1
            return None

        try:
            with skeleton(model, self._plan, self._skip):
                data = self._plan.graph.trace.data
                run_recorded(model, self._dummy_input, check, data=data, products=False)
        except _Stop as stop:
            return stop.mismatch
        except Exception as error:  # whatever a forward raises when a size is not what it expects
            operator = self.operators[position] if position < len(self.operators) else None
            return Mismatch(
                position, operator, str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            )
        position = self._past_views(position)
        if position < len(self.operators):
            return Mismatch(position, self.operators[position], "the compact model runs fewer operators")
        return None

    def _is_view(self, position: int) -> bool:
        return position < len(self.operators) and plain_name(self.operators[position].name) in _VIEWS

    def _is_over_one(self, operator: Operator, count: int) -> bool:
        """Whether an operator sums products over what is a single index now, and gives ``count`` numbers."""
        if operator.name != "aten.bmm" or self.predicted(operator.inputs[0])[2] != 1:
            return False
        return math.prod(self.predicted(operator.outputs[0])) == count

    def _other_start(self, operator: Operator, args: tuple) -> str:
        """Say so where a slice begins at a place that the forward holds, though units before it go."""
        if operator.name != "aten.slice":
            return ""
        dim = operator.argument(1, "dim", 0)
        labels = operator.args[0].labels[dim]
        if labels is None or self.kept(len(labels), labels) == len(labels):
            return ""
        left = self._plan.keeps(labels)
        before = _places(len(labels), *(operator.argument(2 + i, name) for i, name in enumerate(_SLICE)))
        now = _places(int(left.sum()), *(args[2 + i] if len(args) > 2 + i else None for i in range(len(_SLICE))))
        wanted = (np.cumsum(left) - 1)[before[left[before]]]
        if np.array_equal(now, wanted):
            return ""
        if len(now) and len(wanted) and now[0] != wanted[0]:
            return f"it begins at {now[0]}, not {wanted[0]}"
        return f"it takes {len(now)} places, and other ones than the {len(wanted)} that are left of its own"

    def _other_groups(self, operator: Operator, args: tuple) -> str:
        """Say so where channels are taken in as many groups as before, though whole groups go."""
        place = _GROUPS.get(operator.name)
        labels = operator.args[0].labels[1] if place is not None and len(operator.args) > place else None
        if place is None or labels is None or self.kept(len(labels), labels) == len(labels):
            return ""
        left = self._plan.keeps(labels).reshape(operator.args[place], -1)
        wanted = int(left.any(axis=1).sum())
        return f"it counts {args[place]} groups, not {wanted}" if args[place] != wanted else ""

    def _past_views(self, position: int) -> int:
        while self._is_view(position):
            position += 1
        return position


def _as_many_as_watched(func: Any, tensors: list[torch.Tensor], operator: Operator) -> None:
    """Give the results of an operator that finds more or fewer with the values (boxes that do not overlap) their sizes.

    They are filled with what it found when it was watched, after the sizes have been compared.
    """
    if torch.Tag.dynamic_output_shape in func.tags or func.namespace not in _OWN_OPERATORS:
        for tensor, decided in zip(tensors, operator.decided, strict=False):
            if decided is not None and decided.dim() == tensor.dim():
                tensor.resize_(decided.shape)
