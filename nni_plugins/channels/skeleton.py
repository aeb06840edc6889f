"""A model at the sizes of a plan, for a moment and without its data: what a run of the compact model would meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.attributes import element, size_at, with_sizes
from nni_plugins.channels.flexible import exchange
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.stand_in import stand_in


@contextmanager
def skeleton(model: nn.Module, plan: Plan, skip: Collection[str] = ()) -> Iterator[None]:
    """Give parameters, buffers and size attributes the sizes that ``plan`` leaves, and put stand-ins for what goes.

    All is put back on leaving.

    The tensors stay the same objects, so that whoever holds one (a list of flat weights) sees its new size too. Their
    memory is asked for, but on a CPU never touched. Where the model must compute to run at all
    (``plan.graph.trace.data`` is 'real'), they hold what is kept.

    Parameters
    ----------
    model
        The model that the plan's graph was watched on.
    plan
        What is kept.
    skip
        Names of modules that are compact already.
    """
    real = plan.graph.trace.data == "real"
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    exchanged: list[Callable[[], None]] = []
    attributes: list[tuple[nn.Module, str, Any]] = []
    try:
        exchanged += [stand_in(modules[name], result) for name, result in plan.stand_ins().items() if name not in skip]
        exchanged += [exchange(modules[name]) for name in plan.flexible() if name not in skip]
        for name, dims in plan.slices().items():
            if name.rpartition(".")[0] not in skip:
                tensor = tensors[name]
                before.append((tensor, tensor.data))
                tensor.data = _kept(tensor.data, dims) if real else _hollow(tensor.data, dims)
        for name, attribute, value in resized(plan, modules, skip):
            owner = modules[name]
            attributes.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
        yield
    finally:
        for owner, attribute, value in reversed(attributes):
            setattr(owner, attribute, value)
        for take_back in exchanged:
            take_back()
        for tensor, data in before:
            tensor.data = data


def resized(plan: Plan, modules: Mapping[str, nn.Module], skip: Collection[str] = ()) -> Iterator[tuple[str, str, Any]]:
    """Yield ``(module name, attribute, new value)`` for every attribute that counts what the plan removes."""
    yield from _fast_paths(plan, modules)
    elements: dict[tuple[str, str], dict[int, int]] = {}
    for (name, held), changes in plan.sizes().items():
        owner = modules.get(name)
        size = size_at(owner, held)
        if owner is None or name in skip or size is None or changes.get(size, size) == size:
            continue
        attribute, place = element(held)
        value: Any = getattr(owner, attribute)
        if isinstance(value, int):
            yield name, attribute, changes[size]
        else:
            elements.setdefault((name, attribute), {})[place or 0] = changes[size]
    for (name, attribute), places in elements.items():
        yield name, attribute, with_sizes(getattr(modules[name], attribute), places)


def _fast_paths(plan: Plan, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Any]]:
    """Keep torch's own encoder layers that lose a part from handing the weights of all parts to one fused operator."""
    for name in dict.fromkeys(gone.rpartition(".")[0] for gone in plan.removal.modules):
        if isinstance(modules.get(name), nn.TransformerEncoderLayer):
            yield name, "activation_relu_or_gelu", 0


def _hollow(data: torch.Tensor, dims: Mapping[int, Any]) -> torch.Tensor:
    shape = [len(dims[d]) if d in dims else size for d, size in enumerate(data.shape)]
    return torch.empty(shape, dtype=data.dtype, device=data.device, memory_format=layout_of(data))


def layout_of(tensor: torch.Tensor) -> torch.memory_format:
    """Return the memory format that ``tensor`` has: channels last or contiguous."""
    for rank, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == rank and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=order):
            return order
    return torch.contiguous_format


def _kept(data: torch.Tensor, dims: Mapping[int, Any]) -> torch.Tensor:
    for dim, kept in dims.items():
        data = data.index_select(dim, torch.as_tensor(kept, device=data.device))
    return data
