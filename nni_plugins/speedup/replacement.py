"""What customised replacers do to a model: which modules they made smaller, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Replacement:
    """Taken before replacers run. They may exchange modules, or give a module's own parameters other data.

    Attributes
    ----------
    names
        After :meth:`look`, the modules that replacers have made smaller, by either way.
    sizes
        After :meth:`look`, ``{module: {attribute: value}}`` of the numbers that they have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: set[str] = set()
        self.sizes: dict[str, dict[str, Any]] = {}
        self._model = model
        self._before: dict[str, nn.Module] = dict(model.named_modules())
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self._before.values():
            own = module.__dict__
            parts = (own, own["_modules"], own["_parameters"], own["_buffers"])
            self._attributes += [(part, dict(part)) for part in parts]
        self._tensors = [(t, t.data, t.grad) for t in [*model.parameters(), *model.buffers()]]
        self._shapes = {name: _shapes(module) for name, module in self._before.items()}
        self._numbers = {name: _numbers(module) for name, module in self._before.items()}

    def look(self) -> None:
        """Find out what was replaced, and give new modules the mode of those whose place they take."""
        for name, module in self._model.named_modules():
            old: nn.Module | None = self._before.get(name)
            if old is not module:
                module.train(old.training if old is not None else module.training)
            if self._shapes.get(name) != _shapes(module) or old is not module:
                self.names.add(name)
            before = self._numbers.get(name, {})
            changed = {key: value for key, value in _numbers(module).items() if before.get(key) != value}
            if changed and type(old) is type(module):
                self.sizes[name] = changed

    def undo(self) -> None:
        """Put everything back."""
        for part, content in self._attributes:
            part.clear()
            part.update(content)
        for tensor, data, gradient in self._tensors:
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient
        self.names.clear()
        self.sizes.clear()


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.shape for name, tensor in own}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, or tuples of them."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_number(item) for item in value)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
