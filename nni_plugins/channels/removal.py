"""Which modules go when blocks are removed, and what stands in for each of them.

A block goes, and with it whatever nobody needs then: the norm in front of it, the scale behind it, the layer that only
fed it. Each is replaced by a module that passes an argument on, or returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nni_plugins.channels.call import Argument, Info, Operator, Other, Path, Span, Written
from nni_plugins.channels.labels import Array, MaybeLabels, Solution
from nni_plugins.channels.needs import Change, Needs
from nni_plugins.channels.values import ZERO, Same
from nni_plugins.channels.windows import Window, window_of

if TYPE_CHECKING:
    from nni_plugins.channels.groups import ChannelGroup


@dataclass(frozen=True)
class Passed:
    """What stands in for a result: the argument at ``path``, copied where somebody writes into it later.

    ``order`` is that of its dimensions in memory, outermost first; None where it is that of the argument.
    """

    path: Path
    copied: bool = False
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Size:
    """As long as a dimension of an argument, after the ``windows`` that convolutions and pools slid along it."""

    path: Path
    dim: int
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Zeros:
    """What stands in for a result: zeros, typed and placed as the argument at ``path``; ``order`` as above."""

    path: Path
    sizes: tuple[Size | _Labels | int, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class _Labels:
    """As many as are kept of these labels; two are alike if their labels are."""

    labels: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Labels) and np.array_equal(self.labels, other.labels)

    __hash__ = None  # type: ignore[assignment]


class CannotStandIn(Exception):
    """Says why nothing can stand in for a module."""


@dataclass
class Removal:
    """What goes.

    Attributes
    ----------
    modules
        By name, what stands in for the result of each module that is replaced, nested as the result is.
    operators
        The operators that are not run any more: bool per operator of the watched run.
    parameters
        Names of the parameters and buffers that go.
    """

    modules: dict[str, Any] = field(default_factory=dict)
    operators: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    parameters: frozenset[str] = frozenset()

    def holds(self, module: str) -> bool:
        """Whether a module is, or is below, one that is replaced."""
        while module:
            if module in self.modules:
                return True
            module = module.rpartition(".")[0]
        return False

    def takes(self, group: ChannelGroup) -> bool:
        """Whether all that a group reaches goes, so that it is nothing to ask about."""
        return bool(self.parameters) and all(member.name in self.parameters for member in group.members)

    def stand_ins(self, count: Callable[[Array], int]) -> dict[str, Any]:
        """Return, as plain data, what stands in for each module; ``count`` says how many of some labels are kept."""
        return {name: _plain(result, count) for name, result in self.modules.items()}


class Remover:
    """Finds out what goes with what.

    Parameters
    ----------
    needs
        Who needs what in the watched run.
    solution
        The classes of labels: dimensions of one class are equally long whatever goes, and those of frozen ones stay.
    aliases
        Further names of parameters and buffers.
    names
        Names of all parameters and buffers.
    """

    def __init__(
        self, needs: Needs, solution: Solution, aliases: Mapping[str, list[str]], names: Collection[str]
    ) -> None:
        self.needs = needs
        self._solution = solution
        self._aliases = aliases
        self._below: dict[str, set[str]] = {}
        for name in names:
            for alias in (name, *aliases.get(name, ())):
                owner = alias.rpartition(".")[0]
                while owner:
                    self._below.setdefault(owner, set()).add(name)
                    owner = owner.rpartition(".")[0]
        self.spans: dict[str, list[Span]] = {}
        for span in needs.trace.spans:
            if span.module:
                self.spans.setdefault(span.module, []).append(span)
        self._last_write = _last_writes(needs)

    def below(self, module: str) -> set[str]:
        """Return the names of the parameters and buffers that a module and those below it hold."""
        return set().union(*(self._below.get(name, set()) for name in self._names(module)))

    def owned(self, modules: Collection[str]) -> frozenset[str]:
        """Return the parameters and buffers that nobody but ``modules`` holds."""
        places = {name for module in modules for name in self._names(module)}
        found = set().union(*(self.below(module) for module in modules))
        return frozenset(name for name in found if all(is_below(alias, places) for alias in self._known_as(name)))

    def removed(self, change: Change, named: Collection[str] = ()) -> Removal:
        """Return what goes after a change: outermost modules that nobody needs now, but none above those ``named``."""
        idle = change.idle | ~self.needs.needed
        busy, was_needed = np.append(0, np.cumsum(~idle)), np.append(0, np.cumsum(change.idle))
        above = {outer for name in named for outer in _above(name)}
        modules: dict[str, Any] = {}
        operators = np.zeros(len(idle), dtype=bool)
        owners = [name for name in self._owners(np.flatnonzero(change.idle)) if name in self.spans]
        for name in sorted(owners, key=lambda name: (name.count("."), self.spans[name][0].start, name)):
            spans = self.spans[name]
            if name in above or is_below(name, modules) or any(busy[s.end] > busy[s.start] for s in spans):
                continue
            if not any(was_needed[s.end] > was_needed[s.start] for s in spans):
                continue
            try:
                modules[name] = self.stand_in(spans, change)
            except CannotStandIn:
                continue  # those below it are asked one by one
            for span in spans:
                operators[span.start : span.end] = True
        return Removal(modules, operators, self.owned(modules))

    def stand_in(self, spans: Sequence[Span], change: Change) -> Any:
        """Return what stands in for the result of a module, the same in all its calls.

        Raises
        ------
        CannotStandIn
            If nothing can, with the reason.
        """
        first, *others = [self._result(span.output, span, change) for span in spans]
        if any(other != first for other in others):
            raise CannotStandIn("it would have to be replaced by different things in different calls")
        return first

    def _result(self, result: Any, span: Span, change: Change) -> Any:
        if isinstance(result, Info):
            return self._tensor(result, span, change)
        if isinstance(result, (tuple, list)):
            return type(result)(self._result(item, span, change) for item in result)
        if isinstance(result, dict):
            if not all(isinstance(key, str) for key in result):
                raise CannotStandIn("it returns a dict whose keys are not strings")
            return {key: self._result(item, span, change) for key, item in result.items()}
        if isinstance(result, Other):
            raise CannotStandIn(f"nothing can stand in for the {result.kind} that it returns")
        return result

    def _tensor(self, info: Info, span: Span, change: Change) -> Any:
        value = self.needs.value(info, change)
        if isinstance(value, Same):
            for path, given in span.arguments:
                if self.needs.value(given, change) == value and given.dtype == info.dtype:
                    order = None if _ordered(given) == _ordered(info) else info.order
                    return Passed(path, copied=self._last_write.get(info, -1) >= span.end, order=order)
            if self.needs.uses(value.root, change) > 0:
                raise CannotStandIn("somebody needs its result")
        if value is not ZERO and not self.needs.is_read_after(info, span.end):
            return None
        return self._zeros(info, span)

    def _zeros(self, info: Info, span: Span) -> Zeros:
        alike = [(path, given) for path, given in span.arguments if given.dtype == info.dtype]
        if not alike:
            raise CannotStandIn("no argument has the element type of its result")
        sizes = tuple(self._size(info, dim, alike) for dim in range(len(info.shape)))
        order = _ordered(info)
        return Zeros(alike[0][0], sizes, None if list(order) == sorted(order) else info.order)

    def _size(self, info: Info, dim: int, arguments: list[tuple[Path, Info]]) -> Size | _Labels | int:
        size, labels = info.shape[dim], info.labels[dim]
        for path, given in arguments:
            fits = len(given.shape) == len(info.shape) and given.shape[dim] == size
            if fits and self._go_together(labels, given.labels[dim]):
                return Size(path, dim)
        if size == 1:
            return 1
        if labels is None or self._go_together(labels, None):
            slid = self._slid(info, dim, {given: path for path, given in arguments})
            if slid is not None:
                return slid
        if labels is not None:
            return _Labels(labels)
        raise CannotStandIn("the size of its result does not follow from its arguments")

    def _slid(self, info: Info, dim: int, arguments: Mapping[Info, Path]) -> Size | None:
        """Follow a spatial dimension back to an argument, through convolutions, pools and what keeps the size."""
        windows: list[Window] = []
        while info not in arguments:
            made = self.needs.made_by(info)
            source = made.args[0] if isinstance(made, Operator) and made.args else None
            if not isinstance(made, Operator) or not isinstance(source, Info) or len(source.shape) != len(info.shape):
                return None
            window = window_of(made, dim)
            if window is not None:
                windows.append(window)
            elif source.shape[dim] != info.shape[dim]:
                return None
            info = source
        return Size(arguments[info], dim, tuple(reversed(windows)))

    def _go_together(self, labels: MaybeLabels, others: MaybeLabels) -> bool:
        """Whether two dimensions of the same length have the same length whatever goes."""
        a, b = (None if each is None else self._solution.classes[each] for each in (labels, others))
        if any(each is not None and not self._solution.frozen[each].all() for each in (a, b)):
            return a is not None and b is not None and np.array_equal(a, b)
        return True

    def _owners(self, operators: Array) -> set[str]:
        """Return the modules that called these operators, and all above them."""
        owners: set[str] = set()
        for index in operators.tolist():
            name = self.needs.trace.operators[index].module
            while name and name not in owners:
                owners.add(name)
                name = name.rpartition(".")[0]
        return owners

    def _names(self, module: str) -> tuple[str, ...]:
        known = self.needs.trace.modules.get(module)
        return known.names if known is not None else (module,)

    def _known_as(self, name: str) -> Iterator[str]:
        yield name
        yield from self._aliases.get(name, ())


def leaves(result: Any) -> Iterator[Info]:
    """Yield the tensors in what a module returned."""
    if isinstance(result, Info):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from leaves(item)
    elif isinstance(result, dict):
        for item in result.values():
            yield from leaves(item)
    elif isinstance(result, Other):
        yield from result.tensors


def _above(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def is_below(name: str, places: Collection[str]) -> bool:
    """Whether ``name`` is among ``places``, or below one of them."""
    while name:
        if name in places:
            return True
        name = name.rpartition(".")[0]
    return False


def _plain(result: Any, count: Callable[[Array], int]) -> Any:
    if isinstance(result, Passed):
        return {"pass": list(result.path), "copy": result.copied, "order": _plain_order(result.order)}
    if isinstance(result, Zeros):
        shape = [_plain_size(size, count) for size in result.sizes]
        return {"zeros": list(result.path), "shape": shape, "order": _plain_order(result.order)}
    if isinstance(result, Argument):
        return {"object": list(result.path)}
    if isinstance(result, (tuple, list)):
        return {type(result).__name__: [_plain(item, count) for item in result]}
    if isinstance(result, dict):
        return {"dict": {key: _plain(item, count) for key, item in result.items()}}
    return {"plain": result}


def _plain_order(order: tuple[int, ...] | None) -> list[int] | None:
    return None if order is None else list(order)


def _ordered(info: Info) -> tuple[int, ...]:
    """The order in memory of the dimensions of which there is more than one index."""
    return tuple(dim for dim in info.order or range(len(info.shape)) if info.shape[dim] > 1)


def _plain_size(size: Any, count: Callable[[Array], int]) -> Any:
    if isinstance(size, _Labels):
        return count(size.labels)
    return [list(size.path), size.dim, [list(w) for w in size.windows]] if isinstance(size, Size) else size


#: Operators whose result is a view of their first argument.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten expand permute transpose t slice select "
        "split split_with_sizes chunk unbind unsafe_split unsafe_chunk detach alias as_strided unfold diagonal narrow"
    ).split()
)


def _last_writes(needs: Needs) -> dict[Info, int]:
    """Return where tensors are last written in place, through themselves or a view of them."""
    last: dict[Info, int] = {}
    for place, operator in enumerate(needs.trace.operators):
        if not operator.name.endswith("_") or not operator.args or not isinstance(operator.args[0], Info):
            continue
        info: Info | None = operator.args[0]
        while info is not None:
            last[info] = place
            made = needs.made_by(info)
            if isinstance(made, Written):
                info = made.before
            elif isinstance(made, Operator) and (made.name in _VIEWS or made.name.endswith("_")):
                info = made.args[0] if isinstance(made.args[0], Info) else None
            else:
                info = None
    return last
