"""What nobody needs any more once some tensors of the run are zero, or stand for others.

:class:`Needs` knows the whole run: which operator made and which read each tensor, and how often each result is needed.
:meth:`Needs.without` then follows a change from where it is made to where it dies out, in both directions, so that a
question costs as much as the part of the model that it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from nni_plugins.channels.bounds import ANYTHING, Bounds, bounds_of
from nni_plugins.channels.call import Info, Operator, Written
from nni_plugins.channels.labels import Array
from nni_plugins.channels.trace import Trace
from nni_plugins.channels.values import SPLITS, Same, Value, results

Node = Operator | Written


@dataclass
class Change:
    """What is different once some tensors are zero.

    Attributes
    ----------
    values
        What tensors equal now, of those that equal something else than before.
    idle
        The operators that were needed and are not any more: bool per operator of the run.
    lost
        How many needed readers each tensor has lost (or, below zero, won).
    """

    values: dict[Info, Value] = field(default_factory=dict)
    idle: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    lost: Counter[Info] = field(default_factory=Counter)


class Needs:
    """The run as a graph of operators: what each tensor equals, and who needs it.

    Attributes
    ----------
    needed
        Whether an operator's results reach an output: bool per operator of the run.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._nodes: list[Node] = _in_order(trace)
        self._operators = {id(node): i for i, node in enumerate(trace.operators)}
        self._places = [node.place if isinstance(node, Written) else self._operators[id(node)] for node in self._nodes]
        self._made_by: dict[Info, int] = {}
        self._read_by: dict[Info, list[int]] = {}
        self._values: dict[Info, Value] = {}
        self._bounds: dict[Info, Bounds] = {}
        self.parameters: dict[str, list[Info]] = {}
        for index, node in enumerate(self._nodes):
            for info in dict.fromkeys(_inputs(node)):
                self._read_by.setdefault(info, []).append(index)
                if info.parameter and info not in self._made_by and info not in self._known_as(info.parameter):
                    self.parameters.setdefault(info.parameter, []).append(info)
            for info in _outputs(node):
                self._made_by[info] = index
        view = _View(self, {})
        for node in self._nodes:
            for info, value in zip(_outputs(node), self._results(node, view), strict=True):
                if value != Same(info):
                    self._values[info] = value
            if isinstance(node, Operator) and node.outputs:
                bounds = bounds_of(node, self._bounds)
                for info in node.outputs if node.name in SPLITS else node.outputs[:1]:
                    self._bounds[info] = bounds
        self._uses, self._needed = self._who_needs(view)
        self.needed = self._per_operator(np.flatnonzero(self._needed).tolist())

    def _known_as(self, name: str) -> list[Info]:
        return self.parameters.get(name, [])

    def value(self, info: Info, change: Change | None = None) -> Value:
        """Return what a tensor equals: itself, where nothing else is known."""
        found = change.values.get(info) if change is not None else None
        return found or self._values.get(info) or Same(info)

    def readers(self, info: Info) -> list[Node]:
        """Return what reads a tensor, in order."""
        return [self._nodes[index] for index in self._read_by.get(info, [])]

    def made_by(self, info: Info) -> Node | None:
        """Return the operator that made a tensor; None for inputs, parameters and constants."""
        index = self._made_by.get(info)
        return self._nodes[index] if index is not None else None

    def is_read_after(self, info: Info, place: int) -> bool:
        """Whether anything reads a tensor, needed or not, once as many operators as ``place`` have run."""
        return any(self._places[index] >= place for index in self._read_by.get(info, []))

    def uses(self, info: Info, change: Change) -> int:
        """Return how often a tensor is needed, by operators or as an output of the model."""
        return self._uses[info] - change.lost[info]

    # -- the whole run ---------------------------------------------------------------------------------------------

    def _results(self, node: Node, view: _View) -> list[Value]:
        if isinstance(node, Operator):
            return results(view, node)
        unchanged = all(self._adds_nothing(write, view) for write in node.writes)
        return [view.value(node.before) if unchanged else Same(node.info)]

    def _adds_nothing(self, write: Info, view: _View) -> bool:
        """Whether an operator that wrote in place left everything as it was."""
        made = self._nodes[self._made_by[write]]
        target = made.args[0] if isinstance(made, Operator) and made.args else None
        return isinstance(target, Info) and view.value(write) == view.value(target)

    def _who_needs(self, view: _View) -> tuple[Counter[Info], Array]:
        uses: Counter[Info] = Counter()
        for info in self.trace.outputs:
            uses.update(_roots([info], view))
        needed = np.zeros(len(self._nodes), dtype=bool)
        for index in range(len(self._nodes) - 1, -1, -1):
            node = self._nodes[index]
            if any(uses[info] for info in _outputs(node)):
                needed[index] = True
                uses.update(_roots(_inputs(node), view))
        return uses, needed

    def _per_operator(self, nodes: Iterable[int]) -> Array:
        found = np.zeros(len(self.trace.operators), dtype=bool)
        for index in nodes:
            place = self._operators.get(id(self._nodes[index]))
            if place is not None:
                found[place] = True
        return found

    # -- a change --------------------------------------------------------------------------------------------------

    def without(self, known: Mapping[Info, Value]) -> Change:
        """Return what is different once each tensor in ``known`` equals the value that is given for it."""
        before, change = _View(self, {}), Change(values=dict(known))
        view = _View(self, change.values)
        touched = self._follow(known, change, view)
        for index in touched:
            if self._needed[index]:
                inputs = _inputs(self._nodes[index])
                change.lost.update(_roots(inputs, before))
                change.lost.subtract(_roots(inputs, view))
        for info in self.trace.outputs:
            if info in change.values:
                change.lost.update(_roots([info], before))
                change.lost.subtract(_roots([info], view))
        idle = self._idle(change, view)
        change.idle = self._per_operator(idle)
        return change

    def _follow(self, known: Mapping[Info, Value], change: Change, view: _View) -> set[int]:
        """Work out the values of all that is made from what is known; return who reads something that changed."""
        waiting = list({index for info in known for index in self._read_by.get(info, [])})
        heapify(waiting)
        seen = set(waiting)
        while waiting:
            node = self._nodes[heappop(waiting)]
            for info, value in zip(_outputs(node), self._results(node, view), strict=True):
                if info in known or value == self.value(info, change):
                    continue
                change.values[info] = value
                for reader in self._read_by.get(info, []):
                    if reader not in seen:
                        seen.add(reader)
                        heappush(waiting, reader)
        return seen

    def _idle(self, change: Change, view: _View) -> set[int]:
        """Find the nodes that nobody needs now, from those whose results lost a reader backwards."""
        waiting = [self._made_by[info] for info, count in change.lost.items() if count > 0 and info in self._made_by]
        idle: set[int] = set()
        while waiting:
            index = waiting.pop()
            node = self._nodes[index]
            if index in idle or not self._needed[index]:
                continue
            if any(self._uses[info] > change.lost[info] for info in _outputs(node)):
                continue
            idle.add(index)
            for info in _roots(_inputs(node), view).elements():
                change.lost[info] += 1
                if info in self._made_by:
                    waiting.append(self._made_by[info])
        return idle

    def depends_on_input(self, change: Change) -> bool:
        """Whether something of the model's input is still needed, if it was before."""
        used = [info for info in self.trace.inputs if self._uses[info] > 0]
        return not used or any(self.uses(info, change) > 0 for info in used)


class _View:
    """What rules may ask, with a change or without."""

    def __init__(self, needs: Needs, values: Mapping[Info, Value]) -> None:
        self._needs = needs
        self._values = values

    def value(self, info: Info) -> Value:
        return self._values.get(info) or self._needs._values.get(info) or Same(info)

    def bounds(self, info: Info) -> Bounds:
        """What the tensor lies between; a sum with zero lies where the other term does."""
        value = self.value(info)
        known = self._needs._bounds
        return known.get(value.root if isinstance(value, Same) else info, ANYTHING)

    def producer(self, info: Info) -> Operator | None:
        node = self._needs.made_by(info)
        return node if isinstance(node, Operator) else None


def _roots(infos: Iterable[Info], view: _View) -> Counter[Info]:
    """What must be known to know these tensors: what they equal, and nothing of what is zero."""
    values = [view.value(info) for info in infos]
    return Counter(value.root for value in values if isinstance(value, Same))


def _in_order(trace: Trace) -> list[Node]:
    """The operators, with the moments in between at which something was found overwritten."""
    nodes: list[Node] = []
    waiting = list(reversed(trace.written))
    for place, operator in enumerate(trace.operators):
        while waiting and waiting[-1].place <= place:
            nodes.append(waiting.pop())
        nodes.append(operator)
    return nodes + waiting[::-1]


def _inputs(node: Node) -> list[Info]:
    return node.inputs if isinstance(node, Operator) else [node.before, *node.writes]


def _outputs(node: Node) -> list[Info]:
    return node.outputs if isinstance(node, Operator) else [node.info]
