"""Masks of activations (``_input_0``, ``_output_0``), as masks of the parameters that make or read them.

NNI's pruners align such a mask with another layer's weight, so that a norm behind a masked convolution gives zeros too.
What they say can be said by parameters where whole channels are masked: an output is zero if the weight and bias that
make it are, and an input counts for nothing if the columns of the weights that read it are zero.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.channels.call import Contraction, Info, Operator, output_tensors
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array
from nni_plugins.channels.trace import is_inplace
from nni_plugins.channels.watch import run_recorded
from nni_plugins.speedup.flow import JOINS, NORMS
from nni_plugins.speedup.masks import ACTIVATIONS

ActivationMasks = Mapping[tuple[str, str], torch.Tensor]
_SUMS = frozenset(["aten.add", "aten.sub"])


@dataclass(frozen=True)
class _Place:
    """One tensor that went into a module or came out of it, and by which operators: those that the module called."""

    info: Info
    by: range


@dataclass(frozen=True)
class _Edit:
    """Entries of a parameter that are to be masked, one index array a dimension (empty: all along it)."""

    name: str
    index: tuple[Array | None, ...]


class _Cannot(Exception):
    """Why a mask of an activation cannot be said by parameters."""


def with_activations(
    graph: ChannelGraph,
    model: nn.Module,
    dummy_input: Any,
    masks: dict[str, torch.Tensor],
    activations: ActivationMasks,
) -> dict[str, torch.Tensor]:
    """Return the masks of parameters, and with them what masks of activations come to.

    Parameters
    ----------
    graph
        The channel graph of ``model``, watched on ``dummy_input``.
    masks
        ``{parameter name: mask}``; it is not changed.
    activations
        From :func:`~nni_plugins.speedup.masks.activation_masks`.

    Raises
    ------
    ValueError
        In one line, if a mask does not fit, or no mask of parameters would do the same.
    """
    if not activations:
        return masks
    out = dict(masks)
    parameters = dict(model.named_parameters())
    runs = _Runs(graph)
    for (module, target), places in _places(graph, model, dummy_input, activations).items():
        where = f"{module}.{target}" if module else target
        if not places:
            raise ValueError(f"masks: {where} is no tensor that the model computes when it runs on the dummy input")
        try:
            for place in places:
                for dim, units in _units(place.info, activations[module, target]):
                    for edit in runs.edits(place, dim, units, target, len(places)):
                        _apply(edit, out, parameters)
        except _Cannot as error:
            raise ValueError(f"masks: {where} {error}; mask parameters instead") from None
    return out


def _apply(edit: _Edit, masks: dict[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    parameter = parameters[edit.name]
    mask = masks.get(edit.name, torch.ones_like(parameter)).clone()
    ranges = [np.arange(n) if i is None else i for i, n in zip(edit.index, parameter.shape, strict=True)]
    mask[tuple(torch.as_tensor(part, device=mask.device) for part in np.ix_(*ranges))] = 0
    masks[edit.name] = mask


def _units(info: Info, mask: torch.Tensor) -> list[tuple[int, Array]]:
    """Return which whole units a mask covers: per dimension the indices."""
    if mask.dim() > len(info.shape):
        raise _Cannot(f"has shape {info.shape}, its mask {tuple(mask.shape)}")
    alive: Array = (mask != 0).cpu().numpy().reshape((1,) * (len(info.shape) - mask.dim()) + tuple(mask.shape))
    found = []
    rest = alive
    for dim, size in enumerate(alive.shape):
        whole = alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim))
        if size == 1 or whole.all():
            continue
        if size != info.shape[dim]:
            raise _Cannot(f"has shape {info.shape}, its mask {tuple(mask.shape)}")
        if info.labels[dim] is None:
            raise _Cannot("is masked at single positions, not in whole channels")
        found.append((dim, np.flatnonzero(~whole)))
        rest = rest.compress(whole, axis=dim)
    if not rest.all():
        raise _Cannot("is masked at single positions, not in whole channels")
    return found


def _places(
    graph: ChannelGraph, model: nn.Module, dummy_input: Any, activations: ActivationMasks
) -> dict[tuple[str, str], list[_Place]]:
    """Run the model once more, and return where in the watched run each masked tensor is."""
    operators = graph.trace.operators
    made: dict[int, Info] = {}
    alive: list[Any] = []
    found: dict[tuple[str, str], list[_Place]] = {key: [] for key in activations}
    count = 0
    starts: list[int] = []

    def on_operator(func: Any, args: tuple, kwargs: dict, out: Any, module: str) -> None:
        nonlocal count
        tensors = output_tensors(out)
        if not tensors:
            return
        for tensor, info in zip(tensors, operators[count].outputs, strict=True):
            made[id(tensor)] = info
        if is_inplace(func):
            made[id(args[0])] = operators[count].outputs[0]
        alive.extend((tensors, args[:1]))
        count += 1

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        starts.append(count)

    def after(name: str, targets: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            start = starts.pop()
            for target in targets:
                tensor = _given(module, args, kwargs, target) if target.startswith("_input_") else _made(out, target)
                info = made.get(id(tensor))
                if info is not None:
                    found[name, target].append(_Place(info, range(start, count)))

        return hook

    targets: dict[str, list[str]] = defaultdict(list)
    for name, target in activations:
        targets[name].append(target)
    with ExitStack() as stack:
        for name, wanted in targets.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name, wanted), with_kwargs=True).remove)
        run_recorded(model, dummy_input, on_operator, data=graph.trace.data)
    return found


def _given(module: nn.Module, args: tuple, kwargs: dict, target: str) -> Any:
    key = target.removeprefix(ACTIVATIONS[0])
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    values = [*given.values()]
    return values[int(key)] if key.isdigit() and int(key) < len(values) else given.get(key)


def _made(out: Any, target: str) -> Any:
    key = target.removeprefix(ACTIVATIONS[1])
    if isinstance(out, Mapping):
        return out.get(key)
    if isinstance(out, (tuple, list)):
        return out[int(key)] if key.isdigit() and int(key) < len(out) else None
    return out if key in ("", "0") else None


class _Runs:
    """The watched run, by who made a tensor and who reads it."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._parameters = graph.trace.parameters
        self._final = {id(info) for info in graph.trace.outputs}
        self._maker: dict[int, Operator] = {}
        self._readers: dict[int, list[tuple[int, Operator]]] = defaultdict(list)
        self._weights: dict[str, int] = defaultdict(int)
        for index, operator in enumerate(graph.trace.operators):
            for info in operator.outputs:
                self._maker[id(info)] = operator
            for info in {id(info): info for info in operator.inputs}.values():
                self._readers[id(info)].append((index, operator))
                if info.parameter:
                    self._weights[info.parameter] += 1

    def edits(self, place: _Place, dim: int, units: Array, target: str, calls: int) -> list[_Edit]:
        """Return what to mask so that the units of a tensor are zero, or count for nothing."""
        inside = target.startswith(ACTIVATIONS[0])
        if inside:
            ways = [lambda: self._unread(place.info, dim, units, place.by)]
            if all(index in place.by for index, _ in self._readers[id(place.info)]):
                ways.append(lambda: self._made_zero(place.info, dim, units, calls))
        else:
            ways = [
                lambda: self._made_zero(place.info, dim, units, calls),
                lambda: self._unread(place.info, dim, units),
            ]
        failed: list[_Cannot] = []
        for way in ways:
            try:
                return way()
            except _Cannot as error:
                failed.append(error)
        raise failed[0]

    def _made_zero(self, info: Info, dim: int, units: Array, calls: int) -> list[_Edit]:
        edits = self._silent(info, dim, units)
        for edit in edits:
            if self._weights[edit.name] > calls:
                raise _Cannot(f"is made by {edit.name}, which is used elsewhere too")
        return edits

    # -- making it zero --------------------------------------------------------------------------------------------

    def _silent(self, info: Info, dim: int, units: Array) -> list[_Edit]:
        """What to mask so that ``units`` of ``info`` are zero, and nothing else changes."""
        if info.parameter:
            return [_Edit(info.parameter, tuple(units if d == dim else None for d in range(len(info.shape))))]
        operator = self._maker.get(id(info))
        if operator is None:
            raise _Cannot("comes from the model's input")
        for c in operator.contractions:
            if c.weight and c.right is not None and c.out_dim == dim and info is operator.outputs[0]:
                return self._rows(c, units)
        name = operator.name.rstrip("_")
        if name in NORMS:
            return self._affine(operator, info, dim, units)
        same = [i for i in operator.inputs if len(i.shape) == len(info.shape) and i.shape[dim] == info.shape[dim]]
        if name in _SUMS and len(same) == len(operator.inputs) > 1:
            return [edit for part in same for edit in self._silent_here(part, dim, units, operator)]
        if name == "aten.mul" and same:
            return self._first_silent(same, dim, units, operator)
        dynamic = [i for i in operator.inputs if i.dynamic]
        if name in JOINS:
            return self._pieces(dynamic, info, dim, units, operator)
        if len(dynamic) == 1 and info.zeros[dim]:
            other, index = _followed(info, dim, units, dynamic[0])
            return self._silent_here(dynamic[0], other, index, operator)
        raise _Cannot(f"is made by {name}, whose result no mask of parameters makes zero")

    def _silent_here(self, info: Info, dim: int, units: Array, reader: Operator) -> list[_Edit]:
        others = any(operator is not reader for _, operator in self._readers[id(info)])
        if others or (id(info) in self._final and not info.parameter):
            raise _Cannot("is made of a tensor that is used elsewhere too")
        return self._silent(info, dim, units)

    def _first_silent(self, infos: list[Info], dim: int, units: Array, reader: Operator) -> list[_Edit]:
        for info in sorted(infos, key=lambda i: i.dynamic):
            try:
                return self._silent_here(info, dim, units, reader)
            except _Cannot as error:
                last = error
        raise last

    def _pieces(self, parts: list[Info], info: Info, dim: int, units: Array, reader: Operator) -> list[_Edit]:
        """Of a concatenation along ``dim``, each part makes its own units."""
        if sum(part.shape[dim] for part in parts) != info.shape[dim]:
            raise _Cannot("is joined along another dimension")
        edits, start = [], 0
        for part in parts:
            inside = units[(units >= start) & (units < start + part.shape[dim])] - start
            if len(inside):
                edits += self._silent_here(part, dim, inside, reader)
            start += part.shape[dim]
        return edits

    def _rows(self, c: Contraction, units: Array) -> list[_Edit]:
        assert c.right is not None
        labels = c.right.labels[c.right_out]
        if labels is None:
            raise _Cannot("is made by a weight of fixed size")
        if c.groups > 1 and c.right_out != 0:
            raise _Cannot("is made by a grouped transposed convolution")
        edits = [self._edit(labels[units])]
        if c.bias is not None:
            if not c.bias.parameter:
                raise _Cannot("is made with a bias that is computed")
            edits.append(_Edit(c.bias.parameter, (*(None,) * (len(c.bias.shape) - 1), units)))
        return edits

    def _edit(self, labels: Array) -> _Edit:
        """Find the parameter and dimension that these labels belong to."""
        for name, dims in self._parameters.items():
            for dim, own in enumerate(dims):
                if own is not None and np.isin(labels, own).all():
                    index = np.flatnonzero(np.isin(own, labels))
                    return _Edit(name, tuple(index if d == dim else None for d in range(len(dims))))
        raise _Cannot("is made by a weight that is computed")

    def _affine(self, operator: Operator, info: Info, dim: int, units: Array) -> list[_Edit]:
        params = [i for i in operator.inputs[1:] if i.parameter and not i.parameter.endswith(_STATISTICS)]
        channels = len(info.shape) - 1 if operator.name.rstrip("_") in _LAST else 1
        if not params or dim != channels or info.shape[dim] != params[0].shape[-1]:
            raise _Cannot("is made by a norm without a weight for it")
        return [_Edit(i.parameter, (*(None,) * (len(i.shape) - 1), units)) for i in params]

    # -- making it count for nothing -------------------------------------------------------------------------------

    def _unread(self, info: Info, dim: int, units: Array, by: range | None = None) -> list[_Edit]:
        """What to mask so that nothing, or none of the operators ``by``, reads ``units`` of ``info``."""
        if by is None and id(info) in self._final:
            raise _Cannot("is an output of the model")
        edits = []
        for index, operator in self._readers[id(info)]:
            if by is not None and index not in by:
                continue
            contraction = next((c for c in operator.contractions if c.left is info and c.left_dim == dim), None)
            name = operator.name.rstrip("_")
            if contraction is not None and contraction.weight:
                edits.append(self._columns(contraction, dim, units))
            elif contraction is not None or name in NORMS or name in _SUMS or not operator.outputs[0].zero:
                raise _Cannot(f"is read by {name}, for which no mask of parameters makes it zero")
            else:
                for out in (o for o in operator.outputs if id(o) in self._readers or id(o) in self._final):
                    other, there = _followed(info, dim, units, out)
                    edits += self._unread(out, other, there)
        return edits

    def _columns(self, c: Contraction, dim: int, units: Array) -> _Edit:
        assert c.right is not None
        labels = c.right.labels[c.right_dim]
        if c.groups == 1 and labels is not None:
            edit = self._edit(labels[units])
            if self._weights[edit.name] > 1:
                raise _Cannot(f"is read by {edit.name}, which is used elsewhere too")
            return edit
        per_group = c.left.shape[dim] // c.groups
        if per_group != 1 or not c.right.parameter or c.right_out != 0:
            raise _Cannot("is read by a grouped convolution")
        rows = c.right.shape[0] // c.groups
        index = (units[:, None] * rows + np.arange(rows)).reshape(-1)
        return _Edit(c.right.parameter, (index, *(None,) * (len(c.right.shape) - 1)))


_LAST = frozenset(["aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm"])
_STATISTICS = ("running_mean", "running_var")


def _followed(source: Info, dim: int, units: Array, target: Info) -> tuple[int, Array]:
    """Return which dimension of ``target`` carries the units of ``source``, and where."""
    if source.shape == target.shape and source.labels[dim] is target.labels[dim]:
        return dim, units
    labels = source.labels[dim]
    if labels is not None:
        wanted = labels[units]
        for other, carried in enumerate(target.labels):
            if carried is None or not np.isin(wanted, carried).all():
                continue
            if np.isin(wanted, np.delete(labels, units)).any():
                raise _Cannot("is masked at a part of what one channel became")
            return other, np.flatnonzero(np.isin(carried, wanted))
    raise _Cannot("is reshaped in a way that takes its channels apart")
