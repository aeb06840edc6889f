"""One call of an operator: what is known of its tensors, and what its rule may say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nni_plugins.channels.labels import Array, Cause, MaybeLabels

if TYPE_CHECKING:
    from nni_plugins.channels.trace import Trace


#: Where in a module's arguments something is: a position or a keyword, then places in what is nested there.
Path = tuple[int | str, ...]


@dataclass(eq=False)
class Info:
    """What is known of one tensor of the run.

    Attributes
    ----------
    shape
        Its shape.
    labels
        Per dimension, the labels of its indices, or None where nothing that could be removed lies along it.
    dynamic
        Whether it depends on the model's input.
    zero
        Whether it holds exact zeros wherever a unit is masked (so that summing over units loses nothing). Given as one
        answer, or one for each dimension, which are kept as ``zeros``.
    parameter
        The name of the parameter or buffer that it is, or ''.
    made
        How many operators had run when it was made or last written.
    dtype
        Its element type.
    order
        The order of its dimensions in memory, outermost first, of what modules are given and return.
    written
        The few numbers that the forward itself wrote into it (``torch.tensor(x.shape[1])``).
    """

    shape: tuple[int, ...]
    labels: list[MaybeLabels]
    dynamic: bool = False
    zero: bool | Sequence[bool] = False
    parameter: str = ""
    made: int = 0
    dtype: torch.dtype | None = None
    order: tuple[int, ...] | None = None
    written: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rank, zero = len(self.shape), self.zero
        if isinstance(zero, bool):
            self.zeros: list[bool] = [zero] * rank
        else:
            self.zeros = list(zero) if len(zero) == rank else [all(zero)] * rank
        asked = [z for z, labels in zip(self.zeros, self.labels, strict=True) if labels is not None]
        self.zero = all(asked or self.zeros) if rank else bool(zero)

    def along(self, back: int, size: int) -> MaybeLabels:
        """Return the labels of dimension ``-back`` where it has ``size``: what meets there under broadcasting."""
        return self.labels[-back] if len(self.shape) >= back and self.shape[-back] == size else None

    def zero_along(self, back: int, size: int) -> bool:
        """Whether it has such a dimension, and is zero where a unit along it is masked."""
        return len(self.shape) >= back and self.shape[-back] == size and self.zeros[-back]


@dataclass(frozen=True)
class Contraction:
    """A sum over a labelled dimension of ``left``, multiplied by ``right`` (None for a plain sum).

    ``weight`` says that ``right`` is a parameter of the model (or made of them), whose ``right_out`` dimension becomes
    the dimension ``out_dim`` of the result; ``padded`` that zeros are put around the input before it. ``gates`` is the
    number of gates of a recurrent layer that the rows of ``right`` make, 0 where the product is the result itself.
    """

    left: Info
    left_dim: int
    right: Info | None = None
    right_dim: int = 0
    right_out: int = 0
    out_dim: int = 0
    groups: int = 1
    weight: bool = False
    bias: Info | None = None
    padded: bool = False
    gates: int = 0


@dataclass(eq=False)
class Operator:
    """One operator of the run; ``args`` and ``kwargs`` are as it was called, with infos in place of tensors.

    Along the dimensions ``mixed``, what it gives at one index depends on the other indices. Where the run computed,
    ``decided`` are the indices and truth values that it made of other numbers: what the forward went on from.
    """

    name: str
    module: str
    inputs: list[Info]
    outputs: list[Info]
    contractions: list[Contraction] = field(default_factory=list)
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mixed: frozenset[int] = frozenset()
    decided: tuple[torch.Tensor | None, ...] = ()

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument at ``position``, or called ``name``."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module that has no children: its name, and the tensors that went in and came out."""

    module: str
    inputs: list[Info]
    outputs: list[Info]


@dataclass(eq=False)
class Span:
    """One call of a module that holds parameters, with those below it.

    Attributes
    ----------
    module
        Its name.
    start, end
        The operators that it ran: from ``start`` up to, not including, ``end``.
    arguments
        Which argument held which tensor: ``(path, info)``, where a path is a position or a keyword, and then the places
        in nested tuples, lists and dicts.
    output
        What it returned: an info, nested in tuples, lists and dicts as it was; :class:`Argument` where it returned an
        object that it was given; plain values as they are; and :class:`Other` for anything else.
    """

    module: str
    start: int
    arguments: list[tuple[Path, Info]]
    end: int = 0
    output: Any = None


@dataclass(frozen=True)
class Written:
    """A tensor that was read after parts of it, or what it is a part of, were written in place.

    Attributes
    ----------
    place
        How many operators had run when it was read.
    info, before
        What was known of it from then on, and before.
    writes
        The results of the operators that wrote.
    """

    place: int
    info: Info
    before: Info
    writes: list[Info]


@dataclass(frozen=True)
class KnownModule:
    """What is known of a module: all its names, its class, and whether it is one of torch.nn's without children."""

    names: tuple[str, ...]
    kind: str
    elementary: bool


@dataclass(frozen=True)
class Argument:
    """An object that a module returned as it was given, by its path."""

    path: Path


@dataclass(frozen=True)
class Other:
    """Any other object that a module returned: its class, and the tensors in it."""

    kind: str
    tensors: tuple[Info, ...]


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one operator: ``coefficient`` times the number of kept labels of each factor.

    ``operator`` is its place in the run.
    """

    module: str
    coefficient: float
    factors: tuple[Array, ...]
    operator: int = -1


Rule = Callable[["Call"], "list[MaybeLabels] | None"]


class Call:
    """One call of an operator, as its rule sees it.

    A rule reads arguments (:meth:`tensor`, :meth:`value`), says what holds (:meth:`tie`, :meth:`freeze`, …) and returns
    the labels of the first output, a list with one entry per dimension; :meth:`give` sets those of the others.
    """

    def __init__(self, trace: Trace, func: Any, args: tuple, kwargs: dict, out: Any, module: str, name: str) -> None:
        self.trace = trace
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.module = module
        self.cause = Cause(module, name)
        self.zero: bool | Sequence[bool] = False
        self.inputs = [trace.info(t) for t in _tensors((args, kwargs))]
        self.outputs = list(_tensors(out))
        self.given: dict[int, list[MaybeLabels]] = {}
        self.contractions: list[Contraction] = []
        self.mixed: set[int] = set()

    def value(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument at ``position``, or called ``name``."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def tensor(self, position: int, name: str = "") -> Info | None:
        """Return what is known of the tensor argument at ``position``, or called ``name``; None where there is none."""
        value = self.value(position, name)
        return self.trace.info(value) if isinstance(value, torch.Tensor) else None

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return the shape of output ``index``."""
        return tuple(self.outputs[index].shape)

    def carry(self, x: Info, places: Sequence[int | None]) -> list[MaybeLabels]:
        """Return the labels of a result whose dimensions are those of ``x`` at ``places`` (None: a new one).

        Zeros come with them.
        """
        self.zero = [True if place is None else x.zeros[place] for place in places]
        return [None if place is None else x.labels[place] for place in places]

    def give(self, index: int, labels: list[MaybeLabels]) -> None:
        """Set the labels of output ``index``."""
        self.given[index] = labels

    def because(self, why: str) -> Cause:
        return Cause(self.module, self.cause.operator, why)

    def tie(self, a: MaybeLabels, b: MaybeLabels) -> None:
        self.trace.labels.tie(a, b, self.because("joined to something of fixed size"))

    def freeze(self, labels: MaybeLabels, why: str) -> None:
        self.trace.labels.freeze(labels, self.because(why))

    def freeze_silently(self, labels: MaybeLabels) -> None:
        self.trace.labels.freeze(labels, None)

    def inexact(self, labels: MaybeLabels, why: str) -> None:
        self.trace.labels.mark_inexact(labels, self.because(why))

    def fresh(self, size: int) -> Array:
        return self.trace.labels.fresh(size)

    def mix(self, *dims: int) -> None:
        """Say that what comes out at one index along these dimensions depends on the other indices too."""
        self.mixed.update(dims)

    def size_of(self, attribute: str, labels: MaybeLabels) -> None:
        """Say that ``attribute`` of the calling module, if it has one of this value, counts these labels."""
        if labels is not None:
            self.trace.sizes.setdefault((self.module, attribute), []).append(labels)

    def contract(self, left: Info, left_dim: int, right: Info, right_dim: int, **details: Any) -> None:
        """Tie the contracted dimensions of a product, and note it for later questions about what masking leaves."""
        self.tie(left.labels[left_dim], right.labels[right_dim])
        weight = not right.dynamic
        if weight:
            self.trace.consumed.append(right.labels[right_dim])
        if not left.zeros[left_dim] and not right.zeros[right_dim]:
            self.inexact(left.labels[left_dim], "a masked unit is not zero where it is summed over")
        rows = len(right.shape) > 1  # a vector of weights has none: its product makes no new units
        self.contractions.append(Contraction(left, left_dim, right, right_dim, weight=weight and rows, **details))

    def sum_over(self, info: Info, dim: int) -> None:
        """Note a plain sum over a dimension."""
        if info.labels[dim] is None:
            return
        if not info.zeros[dim]:
            self.inexact(info.labels[dim], "a masked unit is not zero where it is summed over")
        self.contractions.append(Contraction(info, dim))

    def reduced(self, info: Info, dim: int) -> None:
        """Note a reduction over a dimension for which removing is not masking: a mean, a maximum."""
        if info.labels[dim] is not None:
            self.inexact(info.labels[dim], "reduced over channels")
            self.contractions.append(Contraction(info, dim))

    def divides(self, info: Info, labels: MaybeLabels) -> None:
        """Say that ``info``, which is zero where a unit of ``labels`` is masked, is divided by.

        Of a weight by its own norm that would make 0/0, so there the weight is not masked along these labels: whatever
        multiplies it is. What depends on the input cannot be helped that way.
        """
        if labels is None:
            return
        if info.dynamic:
            self.inexact(labels, "a masked unit would be divided by zero")
        else:
            self.trace.divisors.append((info, labels))

    def multiple_of(self, labels: MaybeLabels, number: int) -> None:
        """Say that the operator runs only where what is left of these is a multiple of ``number``."""
        if labels is not None:
            self.trace.multiples.append((labels, number, self.because(f"its kernel takes multiples of {number} only")))

    def costs(self, macs: int, *factors: MaybeLabels) -> None:
        """Note the multiply-accumulates of this call, which shrink with each of ``factors``."""
        arrays = tuple(f for f in factors if f is not None)
        share = macs / float(np.prod([len(a) for a in arrays])) if arrays else float(macs)
        self.trace.terms.append(Term(self.module, share, arrays, len(self.trace.operators)))


#: What transformers' models return beside their outputs: keys and values for the next call, as wide as the heads.
_STATE = frozenset(["past_key_values", "past_key_value"])


def output_tensors(out: Any) -> list[torch.Tensor]:
    """Return the tensors in what a model returned: nested tuples, lists, dicts and dataclasses."""
    return list(_tensors(out))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _STATE:
                yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name, None))
