"""The trace: what one watched run was, operator by operator, with the labels that each tensor carried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from nni_plugins.channels.call import (
    Argument,
    Call,
    Info,
    KnownModule,
    ModuleCall,
    Operator,
    Other,
    Path,
    Span,
    Term,
    Written,
    output_tensors,
)
from nni_plugins.channels.divisors import unmasked
from nni_plugins.channels.flexible import is_flexible
from nni_plugins.channels.labels import Array, Cause, Labels, MaybeLabels
from nni_plugins.channels.preserve import tensors_held
from nni_plugins.channels.rules import rule_for
from nni_plugins.channels.watch import Data, has_no_data, on_least_data, run_recorded

if TYPE_CHECKING:
    from nni_plugins.channels.blocks import Block
    from nni_plugins.channels.needs import Needs

#: What makes a tensor of numbers written in the forward; of no more than so many, they are remembered.
LITERALS = frozenset(["aten.lift_fresh", "aten.lift_fresh_copy"])
_FEW = 16
#: How deep in nested arguments tensors are looked for.
_DEPTH = 3


class Trace:
    """One watched run: operators, labels, costs, and the parameters and buffers that it used.

    Attributes
    ----------
    data
        What the run was made on.
    operators
        In the order of the run.
    labels
        What was collected about labels.
    parameters
        By name, the labels of each dimension of each parameter and buffer that the run used.
    sizes
        ``(module, attribute) -> labels`` that the attribute may count, such as ``('conv1', 'out_channels')``.
    terms
        The multiply-accumulates.
    consumed
        Label arrays of parameters' contracted dimensions: their units are consumers.
    unknown
        Operators that have no rule, and where they were called.
    calls
        Calls of modules without children, in order.
    spans
        Calls of modules that hold parameters, themselves or below them, in the order in which they began.
    inputs, outputs
        What the model was given, and what it returned.
    written
        Tensors that were read after a part of them had been written in place.
    modules
        What is known of each module, by its first name.
    flexible
        Names of modules that ran with an exchanged forward: see :mod:`nni_plugins.channels.flexible`.
    divisors
        What is zero where a unit is masked, and divided by, with the labels of those units.
    unmasked
        ``(parameter, dimension)`` along which a parameter must not be masked, for that would make it 0/0.
    multiples
        Labels of which a kernel takes certain numbers only, and the number that theirs must be a multiple of.
    numbers
        By module, the numbers that its forward read from tensors, in order; None for those that no input decides.
    """

    def __init__(self, model: nn.Module) -> None:
        self.data: Data = "none"
        self.operators: list[Operator] = []
        self.labels = Labels()
        self.parameters: dict[str, list[MaybeLabels]] = {}
        self.sizes: dict[tuple[str, str], list[Array]] = {}
        self.terms: list[Term] = []
        self.consumed: list[MaybeLabels] = []
        self.unknown: dict[tuple[str, str], Cause] = {}
        self.calls: list[ModuleCall] = []
        self.spans: list[Span] = []
        self.inputs: list[Info] = []
        self.outputs: list[Info] = []
        self.written: list[Written] = []
        self.modules = _known_modules(model)
        self.needs: Needs | None = None  # made where it is asked for
        self.blocks: dict[str, Block] | None = None
        self.flexible: list[str] = [name for name, module in model.named_modules() if is_flexible(type(module))]
        self._marks: list[int] = []
        self._open: list[tuple[Span, dict[int, Path]]] = []
        self._infos: dict[int, Info] = {}
        self._alive: list[torch.Tensor] = []
        self._written: dict[int, list[Info]] = {}
        self.divisors: list[tuple[Info, Array]] = []
        self.unmasked: set[tuple[str, int]] = set()
        self.multiples: list[tuple[Array, int, Cause]] = []
        self.numbers: dict[str, list[float | None]] = {}
        self._names: dict[int, str] = {}
        self._buffers = {name for name, _ in model.named_buffers()}
        self._storages: dict[tuple, str] = {}
        for name, tensor in _named_tensors(model):
            self._names.setdefault(id(tensor), name)
            self._storages.setdefault(_place(tensor), name)
        held = tensors_held(model)
        self._constants = {id(tensor) for tensor in held}
        self._alive += held

    @classmethod
    def record(cls, model: nn.Module, dummy_input: Any, *, training: bool = False) -> Trace:
        """Watch one run of ``model`` on ``dummy_input``, in eval mode or in ``training`` mode."""
        return on_least_data(lambda data: cls._record(model, dummy_input, data, training))

    @classmethod
    def _record(cls, model: nn.Module, dummy_input: Any, data: Data, training: bool) -> Trace:
        trace = cls(model)
        trace.data = data
        out = run_recorded(
            model,
            dummy_input,
            trace._on_operator,
            on_input=trace._on_input,
            on_module=trace._on_module,
            on_span=(trace._on_enter, trace._on_leave),
            data=data,
            training=training,
        )
        cause = Cause("", "", "the model's output")
        tensors = output_tensors(out)
        if not tensors:
            raise ValueError(
                f"the model returned a {type(out).__name__}, in which no tensor was found; it must return a tensor, "
                "or a tuple, list, dict or dataclass that holds some"
            )
        for tensor in tensors:
            info = trace.info(tensor)
            trace.outputs.append(info)
            for labels in info.labels:
                trace.labels.freeze(labels, cause)
        trace._forget_idle_marks()
        trace.unmasked = unmasked(trace.divisors, trace.operators)
        trace._alive.clear()
        trace._infos.clear()
        return trace

    def info(self, tensor: torch.Tensor) -> Info:
        """Return what is known of ``tensor``; a parameter or buffer seen for the first time gets fresh labels."""
        known = self._infos.get(id(tensor))
        if known is not None:
            return self._as_written(tensor, known) if self._written else known
        if is_functorch_wrapped_tensor(tensor):
            return self.info(get_unwrapped(tensor))
        shape = tuple(tensor.shape)
        name = self._names.get(id(tensor)) or ("" if has_no_data(tensor) else self._storages.get(_place(tensor), ""))
        if name:
            if name not in self.parameters:
                self.parameters[name] = [self.labels.fresh(size) if size > 1 else None for size in shape]
            masked = name not in self._buffers
            info = Info(shape, self.parameters[name], zero=masked, parameter=name, dtype=tensor.dtype)
        else:  # where it comes from was not seen: unless the model holds it, it may depend on the input
            info = Info(shape, [None] * len(shape), dynamic=id(tensor) not in self._constants, dtype=tensor.dtype)
        self._remember(tensor, info)
        return info

    def _as_written(self, tensor: torch.Tensor, known: Info) -> Info:
        """Return what is known of a tensor, a part of which may have been written since, through another view of it."""
        writes = self._written.get(tensor.untyped_storage()._cdata, ())
        newer = [write for write in writes if write.made > known.made and not _apart(write, known)]
        if not newer:
            return known
        if not all(_within(write, known) for write in newer):
            for labels in known.labels:
                self.labels.freeze(labels, Cause("", "", "a part of it is written in place"))
        place, zero = len(self.operators), known.zero and all(write.zero for write in newer)
        info = Info(known.shape, known.labels, True, zero, known.parameter, made=place, dtype=known.dtype)
        self.written.append(Written(place, info, known, newer))
        self._remember(tensor, info)
        return info

    def _remember(self, tensor: torch.Tensor, info: Info) -> None:
        self._infos[id(tensor)] = info
        self._alive.append(tensor)  # else its id may be given to another

    def _on_input(self, tensor: torch.Tensor) -> None:
        info = Info(tuple(tensor.shape), [None] * tensor.dim(), dynamic=True, dtype=tensor.dtype)
        self.inputs.append(info)
        self._remember(tensor, info)

    def _on_enter(self, name: str, args: tuple, kwargs: dict) -> None:
        found = list(_arguments((*enumerate(args), *kwargs.items())))
        arguments = [(path, self._placed(value)) for path, value in found if isinstance(value, torch.Tensor)]
        span = Span(name, len(self.operators), arguments)
        self.spans.append(span)
        self._open.append((span, {id(value): path for path, value in reversed(found)}))

    def _on_leave(self, name: str, output: Any) -> None:
        while self._open:  # a call that raised, and whose caller went on, may have left some open
            span, objects = self._open.pop()
            span.end = len(self.operators)
            if span.module == name:
                span.output = self._structure(output, objects)
                return
            span.output = Other("nothing", ())

    def _placed(self, tensor: torch.Tensor) -> Info:
        """Return what is known of a tensor, and from now on how it lies in memory, too."""
        while is_functorch_wrapped_tensor(tensor):  # in vmap, the operators that are watched see the whole batch
            tensor = get_unwrapped(tensor)
        info = self.info(tensor)
        if info.order is None:
            strides = tensor.stride()
            info.order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
        return info

    def _structure(self, value: Any, objects: dict[int, Path]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._placed(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) in (tuple, list):
            return type(value)(self._structure(item, objects) for item in value)
        if type(value) is dict:
            return {key: self._structure(item, objects) for key, item in value.items()}
        if id(value) in objects:
            return Argument(objects[id(value)])
        return Other(type(value).__name__, tuple(self.info(tensor) for tensor in output_tensors(value)))

    def _on_module(self, name: str, args: Any, output: Any) -> None:
        inputs = [self.info(tensor) for tensor in output_tensors(args)]
        self.calls.append(ModuleCall(name, inputs, [self.info(tensor) for tensor in output_tensors(output)]))

    def _on_operator(self, func: Any, args: tuple, kwargs: dict, out: Any, module: str) -> None:
        name, rule = rule_for(func)
        if name in LITERALS:
            self._constants.add(id(args[0]))
        if isinstance(out, float) and args and isinstance(args[0], torch.Tensor):
            self.numbers.setdefault(module, []).append(out if self.info(args[0]).dynamic else None)
        call = Call(self, func, args, kwargs, out, module, name)
        if not call.outputs:
            return  # prim.device, sym_size and the like
        dynamic = any(info.dynamic for info in call.inputs) or torch.Tag.nondeterministic_seeded in func.tags
        if rule is None:
            cause = self.unknown.setdefault((name, module), call.because("operator without a rule"))
            for info in call.inputs:
                for labels in info.labels:
                    self.labels.freeze(labels, cause)
        else:
            first = rule(call)
            if first is not None:
                call.give(0, first)
        outputs = []
        for index, tensor in enumerate(call.outputs):
            given = call.given.get(index)
            carried: list[MaybeLabels] = given if given is not None else [None] * tensor.dim()
            info = Info(
                tuple(tensor.shape),
                carried,
                dynamic=dynamic,
                zero=call.zero,
                made=len(self.operators) + 1,
                dtype=tensor.dtype,
            )
            self._remember(tensor, info)
            outputs.append(info)
        if name in LITERALS:
            outputs[0].written = numbers_of(args[0])
        if is_inplace(func):
            self._remember(args[0], outputs[0])
            self._written.setdefault(args[0].untyped_storage()._cdata, []).append(outputs[0])
        infos = iter(call.inputs)
        self.operators.append(
            Operator(
                name,
                module,
                call.inputs,
                outputs,
                call.contractions,
                tuple([_with_infos(value, infos) for value in args]),
                {key: _with_infos(value, infos) for key, value in kwargs.items()},
                frozenset(call.mixed),
                _decided(func, call) if self.data == "real" else (),
            )
        )
        self._marks.append(self.labels.inexact_count)

    def _forget_idle_marks(self) -> None:
        """Drop what operators said of exactness whose results reach no output (attention weights that nobody reads)."""
        useful = {id(info) for info in self.outputs}
        idle = []
        for index in range(len(self.operators) - 1, -1, -1):
            operator = self.operators[index]
            if self._writes(operator) or any(id(info) in useful for info in operator.outputs):
                useful.update(id(info) for info in operator.inputs)
            else:
                start = self._marks[index - 1] if index else 0
                idle.append(slice(start, self._marks[index]))
        for marks in idle:
            self.labels.forget_inexact(marks)

    def _writes(self, operator: Operator) -> bool:
        """Whether it writes in place: who reads that, through which view, is not known."""
        return operator.name.endswith("_") or not operator.outputs


def numbers_of(tensor: torch.Tensor) -> tuple[float, ...]:
    """Return what a tensor holds that a forward made of numbers, if it is little."""
    if has_no_data(tensor) or tensor.numel() > _FEW or tensor.is_complex():
        return ()
    return tuple(tensor.flatten().tolist())


def _with_infos(value: Any, infos: Iterator[Info]) -> Any:
    """Return an argument with the infos of its tensors, in their order, in place of the tensors."""
    if isinstance(value, torch.Tensor):
        return next(infos)
    if isinstance(value, (tuple, list)):
        return [_with_infos(item, infos) for item in value]
    return value


def _decided(func: Any, call: Call) -> tuple[torch.Tensor | None, ...]:
    """Return the indices and truth values that an operator made of other numbers, None for its other results."""
    if not any(info.dtype is not None and info.dtype.is_floating_point for info in call.inputs):
        return ()
    own = all(result.alias_info is None for result in func._schema.returns)
    return tuple(t.clone() if own and not (t.is_floating_point() or t.is_complex()) else None for t in call.outputs)


def _arguments(items: Iterable[tuple[int | str, Any]], depth: int = 0) -> Iterator[tuple[Path, Any]]:
    """Yield all tensors and other objects among arguments with their paths, those in tuples, lists and dicts too."""
    for key, value in items:
        if value is None or isinstance(value, (bool, int, float, str)):
            continue
        yield (key,), value
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, (tuple, list)):
            inner = enumerate(value)
        elif type(value) is dict:
            inner = value.items()
        if inner and depth < _DEPTH:
            yield from (((key, *path), item) for path, item in _arguments(inner, depth + 1))


def _known_modules(model: nn.Module) -> dict[str, KnownModule]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {
        own[0]: KnownModule(
            tuple(own),
            f"{type(module).__module__}.{type(module).__qualname__}",
            not module._modules and any(c.__module__.startswith("torch.nn.") and c is not nn.Module
                                        for c in type(module).__mro__),
        )
        for module, own in names.items()
    }  # fmt: skip


def _apart(a: Info, b: Info) -> bool:
    """Whether two views of one tensor share nothing: along some dimension, none of their labels."""
    return len(a.shape) == len(b.shape) and any(
        x is not None and y is not None and not np.isin(x, y).any() for x, y in zip(a.labels, b.labels, strict=True)
    )


def _within(part: Info, whole: Info) -> bool:
    """Whether a view has labels of every labelled dimension of ``whole``, so that it is known which part it is."""
    return all(
        labels is None or any(own is not None and np.isin(own, labels).all() for own in part.labels)
        for labels in whole.labels
    )


def is_inplace(func: Any) -> bool:
    """Whether an operator writes into its first argument."""
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _place(tensor: torch.Tensor) -> tuple:
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
