"""Take units out of a model, in place: parameters, buffers, gradients and the attributes that count them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.flexible import exchange
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.skeleton import layout_of, resized
from nni_plugins.channels.stand_in import stand_in
from nni_plugins.speedup.masked_run import under
from nni_plugins.speedup.masks import as_numpy


class Compaction:
    """One removal from one model, which can be taken back.

    Parameters keep their identity, dtype, device, memory format, ``requires_grad`` and hooks, and modules their mode:
    only their data gets smaller, so optimizers and other owners still hold the right objects.

    Parameters
    ----------
    model
        The model to compact.
    plan
        What is kept.
    skip
        Names of modules that somebody else has made smaller already.
    masks
        By parameter name: what is kept is kept as these leave it.

    Attributes
    ----------
    sizes
        ``{module: {attribute: new value}}``, after :meth:`apply`.
    flexible
        Names of modules that got a forward of flexible width.
    blocks
        By name of each module that is gone, what stands in for it, as plain data. Its parameters stay as they are, for
        whoever still holds them.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        skip: Collection[str] = (),
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self._skip = frozenset(skip)
        self._masks = masks or {}
        self.plan = plan
        self.sizes: dict[str, dict[str, Any]] = {}
        self.flexible: list[str] = []
        self.blocks: dict[str, Any] = {}
        self._exchanged: list[Callable[[], None]] = []
        self._removed: list[Callable[[], None]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._modules = dict(model.named_modules())

    def apply(self) -> None:
        """Remove."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.blocks = {name: r for name, r in self.plan.stand_ins().items() if name not in self._skip}
        self._remove()
        for name in self.plan.flexible():
            if name not in self._skip:
                self._exchanged.append(exchange(self._modules[name]))
                self.flexible.append(name)
        slices = self.plan.slices()
        for name in dict.fromkeys([*slices, *self._masks]):
            if name.rpartition(".")[0] in self._skip:
                continue
            tensor, mask = tensors[name], self._masks.get(name)
            dims = slices.get(name, {})
            index = {dim: torch.as_tensor(kept, device=tensor.device) for dim, kept in dims.items()}
            self._tensors.append((tensor, tensor.data, tensor.grad))
            if not dims:
                assert mask is not None
                tensor.data = under(tensor.data, mask)
                continue
            gradient, tensor.grad = tensor.grad, None
            data = sliced(tensor.data, index)
            if mask is not None:
                left = sliced(mask, index)
                data = data if (as_numpy(left) == 1).all() else under(data, left)
            replace_data(tensor, data)
            if gradient is not None:
                tensor.grad = sliced(gradient, index)
        for module, attribute, value in resized(self.plan, self._modules, self._skip):
            owner = self._modules[module]
            self._attributes.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
            self.sizes.setdefault(module, {})[attribute] = value

    def _remove(self) -> None:
        self._removed += [stand_in(self._modules[name], result) for name, result in self.blocks.items()]

    def _bring_back(self) -> None:
        while self._removed:
            self._removed.pop()()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Put everything back for the time being."""
        small = [(tensor, tensor.data, tensor.grad) for tensor, _, _ in self._tensors]  # exchanged forwards may stay
        values = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in self._attributes]
        for owner, attribute, value in reversed(self._attributes):
            setattr(owner, attribute, value)
        _put(self._tensors)
        self._bring_back()
        try:
            yield
        finally:
            self._remove()
            _put(small)
            for owner, attribute, value in values:
                setattr(owner, attribute, value)

    def undo(self) -> None:
        """Put everything back."""
        for owner, attribute, value in reversed(self._attributes):
            setattr(owner, attribute, value)
        for take_back in self._exchanged:
            take_back()
        _put(self._tensors)
        self._bring_back()
        self._exchanged.clear()
        self._attributes.clear()
        self._tensors.clear()
        self.flexible.clear()
        self.sizes.clear()
        self.blocks = {}


def _put(tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> None:
    for tensor, data, gradient in tensors:
        tensor.grad = None
        replace_data(tensor, data)
        tensor.grad = gradient


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a parameter or buffer other data, of another shape, and let autograd forget the old shape.

    Whoever still holds the loss of an earlier step holds the node that adds up the parameter's gradient, and that node
    expects the old shape. Torch drops it only when the dtype changes: so it is made to change, and back.
    """
    other = torch.float32 if data.dtype != torch.float32 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def sliced(tensor: torch.Tensor, index: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return ``tensor`` with only the given indices along the given dimensions, in the same memory format."""
    out = tensor
    for dim, kept in sorted(index.items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
        out = out.index_select(dim, kept)
    return out.contiguous(memory_format=layout_of(tensor))
