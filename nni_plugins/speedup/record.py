"""What was done to a compact model, kept with it: enough to do it again to a freshly built one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.channels.attributes import as_kind
from nni_plugins.channels.flexible import exchange
from nni_plugins.channels.stand_in import stand_in

if TYPE_CHECKING:
    from nni_plugins.speedup.compact import Compaction

_ATTRIBUTE = "_nni_plugins_record"


def attach(
    model: nn.Module, compaction: Compaction, added: list[str], replaced: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Keep with ``model`` which indices it kept, which attributes changed, which biases came and which modules went.

    ``replaced`` are attributes that replacers changed.

    A model that was compacted before gets the two steps joined into one: indices always count in the first model.
    """
    earlier: dict[str, Any] = {"slices": {}, "shapes": {}, "sizes": {}, "added": [], "flexible": [], "blocks": {}}
    earlier |= getattr(model, _ATTRIBUTE, None) or {}
    graph = compaction.plan.graph
    slices = {name: dict(dims) for name, dims in earlier["slices"].items()}
    for name, dims in compaction.plan.slices().items():
        if name in earlier["added"]:
            continue  # a builder's model does not have it: it is made anew, at its final size
        for dim, kept in dims.items():
            new = torch.as_tensor(kept, dtype=torch.int64)
            old = slices.setdefault(name, {}).get(dim)
            slices[name][dim] = new if old is None else old[new]
    sizes = {module: dict(values) for module, values in earlier["sizes"].items()}
    for changes in (replaced or {}, compaction.sizes):
        for module, values in changes.items():
            sizes.setdefault(module, {}).update(values)
    shapes = {**{name: list(shape) for name, shape in graph.shapes.items()}, **earlier["shapes"]}
    record: dict[str, Any] = {
        "slices": slices,
        "shapes": shapes,
        "sizes": sizes,
        "added": [*earlier["added"], *added],
        "flexible": [*earlier["flexible"], *compaction.flexible],
        "blocks": {**earlier["blocks"], **compaction.blocks},
    }
    for name in record["added"]:
        record["shapes"].pop(name, None)
    setattr(model, _ATTRIBUTE, record)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what was done to ``model``, or None."""
    return getattr(model, _ATTRIBUTE, None)


def restore(model: nn.Module, record: dict[str, Any]) -> None:
    """Give a freshly built model what a record says: flexible forwards, shapes, attributes, biases and stand-ins."""
    for name in record.get("flexible", []):
        exchange(model.get_submodule(name))
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dims in record["slices"].items():
        tensor = tensors[name]
        for dim, kept in dims.items():
            tensor.data = tensor.data.index_select(dim, kept.to(tensor.device))
    _resize(model, record["sizes"])
    for name in record["added"]:
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        weight: Any = owner.weight
        rows = owner.out_channels if hasattr(owner, "out_channels") else weight.shape[0]
        setattr(owner, attribute, nn.Parameter(torch.zeros(rows, dtype=weight.dtype, device=weight.device)))  # type: ignore[arg-type]
    blocks = record.get("blocks", {})
    for name, result in blocks.items():
        stand_in(model.get_submodule(name), result)
    _resize(model, {name: values for name, values in record["sizes"].items() if name in blocks})
    setattr(model, _ATTRIBUTE, record)


def _resize(model: nn.Module, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    for module, values in sizes.items():
        owner = model.get_submodule(module)
        for attribute, value in values.items():
            before = getattr(owner, attribute, None)
            setattr(owner, attribute, as_kind(before, value) if isinstance(value, list) else value)
