"""The operators of a run as they can be called again, alone and at other sizes: arguments without their data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.call import Info, output_tensors
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.latency.sizes import CONSTANT, Sizes
from nni_plugins.channels.replay import COPIES, plain_name
from nni_plugins.channels.rules.registry import rule_for
from nni_plugins.channels.watch import run_recorded

Shape = tuple[int, ...]

#: Arguments that hold the shape of the result.
_SIZES = ("size", "shape")


@dataclass(frozen=True)
class Operand:
    """A tensor argument without its data; ``held`` says that the model holds it (a parameter or a buffer)."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype
    held: bool = False

    def __str__(self) -> str:
        text = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        dense = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != dense:
                return f"{text}/{list(self.stride)}"
            dense *= size
        return text

    def resized(self, shape: Shape) -> Operand:
        """Return the operand with another shape, laid out alike: the same order of dimensions, the same gaps."""
        if shape == self.shape:
            return self
        stride = list(self.stride)
        old = new = 1  # what a dense layout would have as the next stride
        for dim in sorted(range(len(shape)), key=lambda d: (self.stride[d], -d)):
            if self.stride[dim] == 0:
                continue
            gap = self.stride[dim] / old
            stride[dim] = max(1, round(new * gap))
            old, new = self.stride[dim] * self.shape[dim], stride[dim] * shape[dim]
        return Operand(shape, tuple(stride), self.dtype, self.held)


@dataclass
class TimedOperator:
    """One operator of the run on the real device.

    Attributes
    ----------
    func, args, kwargs
        What to call; tensors in the arguments are replaced by :class:`Operand`.
    module
        The module whose forward called it.
    outputs
        Shapes of the results.
    rows
        Per operand and dimension, the row of :class:`Sizes` that says how it shrinks.
    output_rows
        The same for the results.
    groups
        The groups, prunable or not, whose units go through it: their places in the graph's list.
    """

    func: Any
    args: tuple
    kwargs: dict
    module: str
    outputs: list[Shape]
    rows: list[tuple[int, ...]] = field(default_factory=list)
    output_rows: list[tuple[int, ...]] = field(default_factory=list)
    groups: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return str(self.func)

    @property
    def variables(self) -> tuple[int, ...]:
        """The rows by which its operands shrink, in order of appearance; none for a view, which only counts."""
        if is_view(self.func):
            return ()
        return tuple(dict.fromkeys(row for rows in self.rows for row in rows if row != CONSTANT))

    def base(self, row: int) -> int:
        """Return the smallest size of a dimension that shrinks by ``row``."""
        found = zip(operands((self.args, self.kwargs)), self.rows, strict=True)
        return min(size for operand, rows in found for size, r in zip(operand.shape, rows, strict=True) if r == row)

    def at(self, fractions: Mapping[int, float]) -> tuple[tuple, dict]:
        """Return the arguments where each row keeps a fraction of what it counts."""
        shapes = [_scaled(o.shape, rows, fractions) for o, rows in self._with_rows()]
        outputs = [_scaled(s, rows, fractions) for s, rows in zip(self.outputs, self.output_rows, strict=True)]
        old = [operand.shape for operand in operands((self.args, self.kwargs))]
        new = iter(shapes)
        args, kwargs = replace_operands((self.args, self.kwargs), lambda operand: operand.resized(next(new)))
        if shapes == old and outputs == self.outputs:
            return args, kwargs
        return _fitted(self.func, args, kwargs, shapes, self.outputs, outputs)

    def _with_rows(self) -> Iterator[tuple[Operand, tuple[int, ...]]]:
        return zip(operands((self.args, self.kwargs)), self.rows, strict=True)


def record(graph: ChannelGraph, model: nn.Module, dummy_input: Any, sizes: Sizes) -> list[TimedOperator]:
    """Run ``model`` on its own device and return its operators, each with what the graph knows of its sizes.

    The graph may have been watched on tensors without data, where some operators are others than on the device (fused
    attention is taken apart). The two runs are laid side by side: a tensor is known where an operator that both ran
    made or read it.
    """
    run = _Run(model)
    run_recorded(model, dummy_input, run.on_operator, on_input=run.see, data="real")
    watched = graph.trace.operators
    ours = [(_plain(op.func), op.module, tuple(op.outputs)) for op in run.operators]
    theirs = [(plain_name(op.name), op.module, tuple(info.shape for info in op.outputs)) for op in watched]
    partner: dict[int, int] = {}
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        partner.update(zip(range(block.a, block.a + block.size), range(block.b, block.b + block.size), strict=True))
    known: dict[int, Info] = {}
    names = graph.trace.parameters
    for index, (op, ins, outs) in enumerate(zip(run.operators, run.inputs, run.results, strict=True)):
        twin = watched[partner[index]] if index in partner else None
        if twin is not None and len(twin.inputs) == len(ins):
            known.update(zip(ins, twin.inputs, strict=True))
        carried: list[list[MaybeLabels]] = []
        for tag, operand in zip(ins, operands((op.args, op.kwargs)), strict=True):
            info = known.get(tag)
            labels = info.labels if info is not None and info.shape == operand.shape else None
            if labels is None and names.get(run.names.get(tag, "")) is not None:
                labels = names[run.names[tag]]
            labels = labels or [None] * len(operand.shape)
            carried.append(labels)
            op.rows.append(tuple(map(sizes.row, labels)))
            op.groups = op.groups.union(*map(sizes.groups, labels))
        if twin is not None and len(twin.outputs) == len(outs):
            known.update(zip(outs, twin.outputs, strict=True))
        elif carried and _plain(op.func) in (*COPIES, "aten.t"):  # they come, go and change places as layouts fall out
            step = -1 if _plain(op.func) == "aten.t" else 1
            known[outs[0]] = Info(op.outputs[0], carried[0][::step])
        for tag, shape in zip(outs, op.outputs, strict=True):
            info = known.get(tag)
            labels = info.labels if info is not None and info.shape == shape else [None] * len(shape)
            op.output_rows.append(tuple(map(sizes.row, labels)))
            op.groups = op.groups.union(*map(sizes.groups, labels))
    return run.operators


class _Run:
    """Collects operators, with a number for each tensor in place of the tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.operators: list[TimedOperator] = []
        self.inputs: list[list[int]] = []
        self.results: list[list[int]] = []
        self.names: dict[int, str] = {}
        self._tags: dict[int, tuple[weakref.ref, int]] = {}
        self._next = 0
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named():
                self.names[self.tag(tensor)] = name

    def tag(self, tensor: torch.Tensor) -> int:
        known = self._tags.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        self._next += 1
        self._tags[id(tensor)] = (weakref.ref(tensor), self._next)
        return self._next

    def see(self, tensor: torch.Tensor) -> None:
        self.tag(tensor)

    def on_operator(self, func: Any, args: tuple, kwargs: dict, out: Any, module: str) -> None:
        results = output_tensors(out)
        if not results:
            return
        tags: list[int] = []

        def without_data(tensor: torch.Tensor) -> Operand:
            tag = self.tag(tensor)
            tags.append(tag)
            return Operand(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tag in self.names)

        args, kwargs = _mapped((args, kwargs), torch.Tensor, without_data)
        self.operators.append(TimedOperator(func, args, kwargs, module, [tuple(r.shape) for r in results]))
        self.inputs.append(tags)
        self.results.append([self.tag(result) for result in results])


def operands(value: Any) -> Iterator[Operand]:
    """Yield the operands in nested arguments."""
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from operands(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from operands(item)


def replace_operands(value: Any, function: Callable[[Operand], Any]) -> Any:
    """Return nested arguments with ``function`` applied to their operands."""
    return _mapped(value, Operand, function)


def is_view(func: Any) -> bool:
    """Whether an operator only looks at its input in another way: it costs a call, and no more."""
    returns = func._schema.returns
    if func is torch.ops.aten._unsafe_view.default:
        return True
    return bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def key_of(func: Any, args: tuple, kwargs: dict) -> str:
    """Return the signature of a call: operator, shapes, layouts and types of tensors, other arguments."""

    def text(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"[{','.join(map(text, value))}]"
        return f"{value:g}" if isinstance(value, float) else str(value)

    parts = [text(a) for a in args] + [f"{k}={text(v)}" for k, v in kwargs.items()]
    return f"{func}({', '.join(parts)})"


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(item, kind, function) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    return value


def _plain(func: Any) -> str:
    return plain_name(rule_for(func)[0])


def _scaled(shape: Shape, rows: tuple[int, ...], fractions: Mapping[int, float]) -> Shape:
    return tuple(
        size if row == CONSTANT else max(1, round(size * fractions.get(row, 1.0)))
        for size, row in zip(shape, rows, strict=True)
    )


def _fitted(
    func: Any, args: tuple, kwargs: dict, new: list[Shape], outputs: list[Shape], results: list[Shape]
) -> tuple[tuple, dict]:
    """Make arguments that hold sizes agree with operands that were resized."""
    name = str(func.overloadpacket)
    if name in ("aten.convolution", "aten._convolution"):
        x, weight = new[0], new[1]
        groups = results[0][1] // weight[1] if args[6] else x[1] // weight[1]
        return (*args[:8], max(1, groups), *args[9:]), kwargs
    if name == "aten.native_group_norm":
        x, channels, groups = new[0], args[4], args[6]
        whole = x[1] % (channels // groups) == 0  # groups go whole, unless that does not come out even
        groups = x[1] * groups // channels if whole else groups
        return (*args[:3], x[0], x[1], math.prod(x[2:]), groups, *args[7:]), kwargs

    names = [argument.name for argument in func._schema.arguments]

    def resized(argument: str, value: Any) -> Any:
        if argument == "normalized_shape":
            return list(new[0][len(new[0]) - len(value) :])
        if argument in _SIZES and outputs and tuple(value) == outputs[0]:
            return list(results[0])
        return value

    fitted = tuple(resized(argument, value) for argument, value in zip(names, args, strict=False))
    return fitted, {argument: resized(argument, value) for argument, value in kwargs.items()}
