"""What only training runs: parameters that the watched run left out, such as those of auxiliary heads.

In eval mode a GoogLeNet skips its auxiliary classifiers, and yet their weights read channels of the trunk, which would
no longer fit once those are gone. So a model that has parameters that the watched run did not use is run once more, in
training mode, and what it says of these parameters, and of nothing else, is added to the trace.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from nni_plugins.channels.labels import Array, Cause, Solution

if TYPE_CHECKING:
    from nni_plugins.channels.trace import Trace

_logger = logging.getLogger(__name__)


def add_training_only(trace: Trace, model: nn.Module, dummy_input: Any) -> None:
    """Watch ``model`` in training mode, where some of its parameters were not used, and tie these to the channels.

    A model that does not run in training mode on this input (a detector wants targets) is left at that.
    """
    if all(name in trace.parameters for name, _ in model.named_parameters()):
        return
    try:
        other = trace.record(model, dummy_input, training=True)
    except Exception as error:
        _logger.debug("watching in training mode failed: %s", error)
        return
    new = [name for name in other.parameters if name not in trace.parameters]
    if new:
        _Joined(trace, other).add(new)


class _Joined:
    """A trace, and one of the same model in training mode, by the classes that the other's labels come to."""

    def __init__(self, trace: Trace, other: Trace) -> None:
        self._trace = trace
        self._other = other
        self._solution: Solution = other.labels.solve()

    def add(self, names: list[str]) -> None:
        """Give the parameters and buffers ``names`` labels, tied to those that they go with in training."""
        classes = self._solution.classes
        touched = np.zeros(len(self._solution), dtype=bool)
        for name in names:
            for labels in self._other.parameters[name]:
                if labels is not None:
                    touched[classes[labels]] = True
        which = np.flatnonzero(touched)
        anchor = np.full(len(touched), -1, dtype=np.int64)
        anchor[which] = self._trace.labels.fresh(len(which))
        shared = self._tie_to_watched(anchor)
        self._freeze(which, anchor, shared)
        consumed = self._consumed()
        for name in names:
            theirs = self._other.parameters[name]
            mine = [None if labels is None else anchor[classes[labels]] for labels in theirs]
            self._trace.parameters[name] = mine
            both = zip(mine, theirs, strict=True)
            self._trace.consumed += [array for array, labels in both if labels is not None and consumed[labels].any()]
        for key, arrays in self._other.sizes.items():
            whole = [anchor[classes[labels]] for labels in arrays if touched[classes[labels]].all()]
            if whole and key not in self._trace.sizes:
                self._trace.sizes[key] = whole

    def _tie_to_watched(self, anchor: Array) -> Array:
        """Tie each label of the watched run to what goes with it in training; return which classes have one."""
        shared = np.zeros(len(anchor), dtype=bool)
        cause = Cause("", "", "a parameter that only training uses reads it")
        for name, theirs in self._other.parameters.items():
            for labels, mine in zip(theirs, self._trace.parameters.get(name, ()), strict=False):
                if labels is None or mine is None:
                    continue
                classes = self._solution.classes[labels]
                met = anchor[classes] >= 0
                self._trace.labels.tie(mine[met], anchor[classes[met]], cause)
                shared[classes[met]] = True
        return shared

    def _freeze(self, which: Array, anchor: Array, shared: Array) -> None:
        """Freeze what is frozen in training, and what nothing but training reads."""
        only = Cause("", "", "only used in training")
        for klass in which.tolist():
            if self._solution.frozen[klass]:
                self._trace.labels.freeze(anchor[[klass]], self._solution.why_frozen(klass))
            elif not shared[klass]:
                self._trace.labels.freeze(anchor[[klass]], only)

    def _consumed(self) -> Array:
        consumed = np.zeros(self._other.labels.count, dtype=bool)
        for labels in self._other.consumed:
            if labels is not None:
                consumed[labels] = True
        return consumed
