"""Take units out of a model, in place: parameters, buffers, gradients and the attributes that count them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.plan import Plan


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
    """

    def __init__(self, model: nn.Module, plan: Plan, skip: Collection[str] = ()) -> None:
        self.model = model
        self._skip = frozenset(skip)
        self.plan = plan
        self.sizes: dict[str, dict[str, Any]] = {}
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._modules = dict(model.named_modules())

    def apply(self) -> None:
        """Remove."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, dims in self.plan.slices().items():
            if name.rpartition(".")[0] in self._skip:
                continue
            tensor = tensors[name]
            index = {dim: torch.as_tensor(kept, device=tensor.device) for dim, kept in dims.items()}
            self._tensors.append((tensor, tensor.data, tensor.grad))
            gradient, tensor.grad = tensor.grad, None
            replace_data(tensor, sliced(tensor.data, index))
            if gradient is not None:
                tensor.grad = sliced(gradient, index)
        for (module, attribute), changes in self.plan.sizes().items():
            owner = self._modules.get(module)
            if owner is None or module in self._skip or not hasattr(owner, attribute):
                continue
            value: Any = getattr(owner, attribute)
            if isinstance(value, int) and value in changes and not isinstance(value, bool):
                self.set(module, attribute, changes[value])
            elif isinstance(value, (tuple, list)) and len(value) == 1 and value[0] in changes:
                kind = tuple if isinstance(value, tuple) else list
                self.set(module, attribute, kind([changes[value[0]]]))

    def set(self, module: str, attribute: str, value: Any) -> None:
        """Set an attribute of a module, remembering the old value."""
        owner = self._modules[module]
        self._attributes.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)
        self.sizes.setdefault(module, {})[attribute] = value

    def unset(self, module: str, attribute: str) -> None:
        """Take back the last :meth:`set`."""
        owner, name, value = self._attributes.pop()
        assert owner is self._modules[module] and name == attribute
        setattr(owner, attribute, value)
        if any(o is owner and n == attribute for o, n, _ in self._attributes):
            self.sizes[module][attribute] = value
        else:
            del self.sizes[module][attribute]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Put everything back for the time being."""
        small = [(tensor, tensor.data, tensor.grad) for tensor, _, _ in self._tensors]
        values = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in self._attributes]
        for owner, attribute, value in reversed(self._attributes):
            setattr(owner, attribute, value)
        _put(self._tensors)
        try:
            yield
        finally:
            _put(small)
            for owner, attribute, value in values:
                setattr(owner, attribute, value)

    def undo(self) -> None:
        """Put everything back."""
        for owner, attribute, value in reversed(self._attributes):
            setattr(owner, attribute, value)
        _put(self._tensors)
        self._attributes.clear()
        self._tensors.clear()
        self.sizes.clear()


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
    for rank, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == rank and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=order):
            return out.contiguous(memory_format=order)
    return out.contiguous()
