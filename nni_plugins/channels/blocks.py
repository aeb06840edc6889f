"""Whole blocks: residual blocks, branches of them, and experts, which can go at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from nni_plugins.channels.call import Info, Operator, Span
from nni_plugins.channels.needs import Change, Needs
from nni_plugins.channels.removal import CannotStandIn, Removal, leaves
from nni_plugins.channels.values import ZERO, Same, Value

if TYPE_CHECKING:
    from nni_plugins.channels.graph import ChannelGraph

Kind = Literal["residual", "branch", "plain"]


@dataclass(frozen=True)
class Block:
    """A module that can be removed as a whole, or that looks like one and cannot.

    Attributes
    ----------
    name
        The module's name, as in ``named_modules()``.
    kind
        'residual': its result is its input plus something; removed, it passes the input on. 'branch': its result is
        added to something else (attention or MLP of a transformer block, an expert); removed, it returns zeros.
        'plain': its result has the shape of its input; removed, it passes the input on, which is not what masking does.
    exact
        Whether removing it is the same as masking all its parameters to zero.
    removable
        Whether it can be removed at all.
    reason
        Why it is not exact, or not removable; '' where it is both, unless there is something to know about it: experts
        that are stacked in one parameter go together, not one by one.
    parameters
        Names of its own parameters and buffers, all that are below it and nowhere else. A mask of the block is zero for
        all of them that are parameters; a score of the block is made of them.
    gone
        Names of all parameters and buffers that go when it alone is removed: its own, and those that nobody needs then,
        such as the norm in front of it.
    macs, params
        What goes when it alone is removed: multiply-accumulates of one run, and parameters. Several blocks that share
        what feeds them save more together; :meth:`ChannelGraph.cost` with ``blocks`` is exact for any choice. An expert
        that no token was sent to saves no multiply-accumulates.
    sibling
        For an expert that was not called in the watched run: the one that it is known from.
    """

    name: str
    kind: Kind
    exact: bool
    removable: bool
    reason: str
    parameters: tuple[str, ...]
    gone: frozenset[str]
    macs: int
    params: int
    sibling: str = ""

    def __repr__(self) -> str:
        state = "" if self.exact else f", {'not exact' if self.removable else 'stays'}"
        state += f": {self.reason}" if self.reason else ""
        return f"Block({self.name!r}, {self.kind}, macs={self.macs:,}, params={self.params:,}{state})"


def find_blocks(graph: ChannelGraph) -> list[Block]:
    """Return the blocks of a watched model, in the order in which they were first called; nested ones are all there."""
    finder = _Finder(graph)
    found = [block for name in finder.remover.spans for block in finder.looked_at(name)]
    found = finder.without_duplicates(found)
    return [*found, *finder.never_called(found)]


class _Finder:
    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self.remover = graph.remover
        self._needs: Needs = graph.remover.needs
        self._macs = np.zeros(len(graph.trace.operators))
        for term in graph.trace.terms:
            self._macs[term.operator] += term.coefficient * prod(len(factor) for factor in term.factors)
        self._nothing = Change(idle=np.zeros(len(graph.trace.operators), dtype=bool))
        self._outputs = frozenset(graph.trace.outputs)

    def looked_at(self, name: str) -> Iterator[Block]:
        """Yield the block that a module is, if it is one."""
        names = self.remover.below(name)
        spans = self.remover.spans[name]
        results = [info for span in spans for info in leaves(span.output)]
        given = any(info.dynamic for span in spans for _, info in span.arguments)
        if not names or not results or not given:
            return
        own = self.remover.owned([name])
        change = self._needs.without(masked(self._graph, names))
        kind = self._kind(name, spans, change)
        if kind is None:
            return
        if kind == "plain":
            change = self._needs.without(passed_on(self._needs, spans, {}))
        if not self._needs.depends_on_input(change):
            return
        removal, reason = self._removal(name, spans, change, names - own)
        removable = not reason
        if kind == "plain":
            if not removable:
                return
            reason = "its input is changed on the way, not added to"
        reason = reason or self._stacked(name, spans)
        macs, params = self._saved(removal)
        if macs == 0 and self._needs.trace.modules[name].elementary:
            return
        yield Block(name, kind, kind != "plain" and removable, removable, reason, tuple(sorted(own)),
                    removal.parameters, macs, params)  # fmt: skip

    def _kind(self, name: str, spans: Sequence[Span], change: Change) -> Kind | None:
        """What a module is, judged by what it returns when all its parameters are zero."""
        if all(self._told(info, span, change) for span in spans for info in leaves(span.output)):
            passes = any(self._passes_anew(info, span, change) for span in spans for info in leaves(span.output))
            if passes:
                return "residual"
            zeros = [info for span in spans for info in leaves(span.output) if self._needs.value(info, change) is ZERO]
            if zeros and all(self._is_added(info, change) for info in zeros):
                return "branch"
        called = sum(self._macs[span.start : span.end].sum() for span in spans) > 0
        if not called or self._needs.trace.modules[name].elementary:
            return None
        return "plain" if all(_alike(span) is not None for span in spans) else None

    def _told(self, info: Info, span: Span, change: Change) -> bool:
        value = self._needs.value(info, change)
        passed = any(self._needs.value(given, change) == value for _, given in span.arguments)
        return passed or not isinstance(value, Same) or self._needs.uses(value.root, change) == 0

    def _passes_anew(self, info: Info, span: Span, change: Change) -> bool:
        """Whether a result equals an argument now, and did not before."""
        value, before = self._needs.value(info, change), self._needs.value(info)
        return value is not ZERO and value != before and any(
            self._needs.value(given, change) == value for _, given in span.arguments
        )  # fmt: skip

    def _is_added(self, info: Info, change: Change) -> bool:
        """Whether a result that is zero is only ever added to something that depends on the model's input."""
        waiting, seen = [info], {info}
        added = False
        while waiting:
            zero = waiting.pop()
            if zero in self._outputs:
                return False
            for reader in self._needs.readers(zero):
                if not isinstance(reader, Operator):
                    added = True  # written into a part of something else
                    continue
                if self._joins(reader, change):
                    added = True
                    continue
                if any(self._needs.value(out, change) is not ZERO for out in reader.outputs[:1]):
                    return False
                new = [o for o in reader.outputs if self._needs.value(o, change) is ZERO and o not in seen]
                seen.update(new)
                waiting += new
        return added

    def _joins(self, operator: Operator, change: Change) -> bool:
        """Whether an operator puts a zero together with something that depends on the input."""
        if operator.name.rstrip("_") not in _JOINS:
            return False
        others = [info for info in operator.inputs if self._needs.value(info, change) is not ZERO]
        indices = _INDICES.get(operator.name.rstrip("_"), 0)
        return sum(info.dynamic for info in others) > indices

    def _stacked(self, name: str, spans: Sequence[Span]) -> str:
        """Say where a module holds several experts in one parameter."""
        trace = self._needs.trace
        own = {p: self._graph.shapes[p][0] for p in self.remover.below(name)
               if p.rpartition(".")[0] == name and len(self._graph.shapes[p]) > 2}  # fmt: skip
        for operator in (operator for span in spans if own for operator in trace.operators[span.start : span.end]):
            for info in operator.inputs[:2]:
                chosen = operator.name in _CHOOSING and info.parameter in own
                grouped = operator.name == "aten._grouped_mm" and not info.dynamic and info.shape[0] in own.values()
                if chosen or grouped:
                    return f"its {info.shape[0]} experts are stacked in one parameter, and go together"
        return ""

    def _removal(self, name: str, spans: Sequence[Span], change: Change, shared: set[str]) -> tuple[Removal, str]:
        """Return what goes with a block; or if it cannot go, why."""
        if shared:
            return Removal(), f"{min(shared)} is used elsewhere, too"
        removal = self.remover.removed(change, [name])
        if removal.holds(name):
            return removal, ""
        try:
            self.remover.stand_in(spans, change)
        except CannotStandIn as error:
            return Removal(), str(error)
        return Removal(), "something that it makes is used elsewhere, too"

    def _saved(self, removal: Removal) -> tuple[int, int]:
        macs = round(float(self._macs[removal.operators].sum())) if len(removal.operators) else 0
        shapes, is_buffer = self._graph.shapes, self._graph.is_buffer
        return macs, sum(prod(shapes[name]) for name in removal.parameters if not is_buffer[name])

    def without_duplicates(self, found: Sequence[Block]) -> list[Block]:
        """Leave out torch's own layers where a block of several layers says the same: a branch's last norm."""
        elementary = self._needs.trace.modules
        said: set[frozenset[str]] = {b.gone for b in found if b.removable and not elementary[b.name].elementary}
        layers = [block for block in found if elementary[block.name].elementary]
        keep: set[str] = set()
        for block in sorted(layers, key=lambda block: -len(block.parameters)):
            if block.removable and block.gone not in said:
                said.add(block.gone)
                keep.add(block.name)
        return [block for block in found if not elementary[block.name].elementary or block.name in keep]

    def never_called(self, found: Sequence[Block]) -> Iterator[Block]:
        """Yield modules that this run did not call, but whose siblings are experts: no token was sent to them."""
        used, modules = self._needs.trace.parameters, self._needs.trace.modules
        for name, module in modules.items():
            names = self.remover.below(name)
            if not name or not names or name in self.remover.spans or any(below in used for below in names):
                continue
            shapes = self._shapes(name)
            for block in found:
                near = block.name.rpartition(".")[0] == name.rpartition(".")[0]
                if near and block.kind == "branch" and block.exact and modules[block.name].kind == module.kind:
                    own = self.remover.owned([name])
                    if own == names and shapes == self._shapes(block.name):
                        params = sum(prod(self._graph.shapes[n]) for n in own if not self._graph.is_buffer[n])
                        yield replace(block, name=name, parameters=tuple(sorted(own)), gone=own, macs=0, params=params,
                                      sibling=block.name)  # fmt: skip
                        break

    def _shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        return {name[len(module) :]: self._graph.shapes[name] for name in self.remover.below(module)}


#: Operators that put things together, and how many of their inputs are indices that depend on the input.
_JOINS = frozenset(
    (
        "aten.add aten.sub aten.index_add aten.index_put aten.scatter_add aten.scatter aten.index_copy aten.where "
        "aten.stack aten.addcmul"
    ).split()
)
_INDICES = {"aten.index_add": 1, "aten.scatter_add": 1, "aten.where": 1}


#: Operators that take some of what is stacked.
_CHOOSING = frozenset(["aten.select", "aten.index", "aten.index_select"])


def _alike(span: Span) -> tuple[Info, Info] | None:
    """Return the one tensor that a call returned, and the first argument that is like it."""
    results = list(leaves(span.output))
    if len(results) != 1:
        return None
    out = results[0]
    for path, given in span.arguments:
        if len(path) == 1 and given.shape == out.shape and given.dtype == out.dtype:
            return out, given
    return None


def masked(graph: ChannelGraph, names: Iterable[str]) -> dict[Info, Value]:
    """Return what is known where these parameters are masked: they are zero."""
    needs = graph.remover.needs
    parameters = [name for name in names if not graph.is_buffer[name]]
    return {info: ZERO for name in parameters for info in needs.parameters.get(name, ())}


def passed_on(needs: Needs, spans: Iterable[Span], known: Mapping[Info, Value]) -> dict[Info, Value]:
    """Return what is known, beside ``known``, where modules pass their input on: their results equal it."""
    more = dict(known)
    for span in sorted(spans, key=lambda span: span.start):
        found = _alike(span)
        if found is not None:
            out, given = found
            more[out] = needs.value(given, needs.without(more))
    return more


def removal_of(graph: ChannelGraph, names: Sequence[str]) -> Removal:
    """Return what goes when the blocks of these names are removed.

    Raises
    ------
    KeyError
        If there is no such block.
    ValueError
        If one cannot be removed, or if then nothing would depend on the model's input.
    """
    if not names:
        return Removal()
    remover, blocks = graph.remover, [graph.block(name) for name in names]
    for block in blocks:
        if not block.removable:
            raise ValueError(f"block {block.name!r} cannot be removed: {block.reason}")
    known = masked(graph, [name for block in blocks if block.kind != "plain" for name in block.parameters])
    plain = [span for block in blocks if block.kind == "plain" for span in remover.spans[block.name]]
    change = remover.needs.without(passed_on(remover.needs, plain, known))
    if not remover.needs.depends_on_input(change):
        raise ValueError(f"nothing of the model's input would reach its output without {', '.join(names)}; keep one")
    removal = remover.removed(change, names)
    asleep = [block for block in blocks if block.sibling and not removal.holds(block.name)]
    for block in asleep:
        spans = remover.spans[block.sibling]
        its = remover.needs.without(masked(graph, graph.block(block.sibling).parameters))
        removal.modules[block.name] = remover.stand_in(spans, its)
    if asleep:
        removal = replace(removal, parameters=remover.owned(list(removal.modules)))
    return removal
