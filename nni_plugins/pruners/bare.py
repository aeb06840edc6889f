"""Masks without wrappers: parameters stay where they are, and what is masked is set to 0 after every optimizer step.

The forward is then the model's own, at no cost, and the gradient of a parameter is dense at no cost either: it is what
dynamic sparse training grows weights by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

_SETTINGS = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "global_group_id")


class BareTarget:
    """The place of one parameter and of its mask, read as NNI's target spaces are.

    Attributes
    ----------
    mask : torch.Tensor or None
        Of the parameter's shape and dtype, 1 where kept.
    """

    def __init__(self, module: nn.Module, module_name: str, parameter: str, wrapper: ModuleWrapper | None = None):
        self._module, self._target_name = module, parameter
        self._wrapper = SimpleNamespace(name=module_name)
        self._setting: dict[str, Any] = {}
        self._scaler = None
        earlier = wrapper.pruning_target_spaces.get(parameter) if wrapper is not None else None
        self._earlier = earlier
        self.mask: Tensor | None = None if earlier is None or earlier.mask is None else earlier.mask.clone()

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS:
            return self._setting.get(name)
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:  # set by NNI's schedulers
            self._setting[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def target(self) -> Tensor | None:
        """The live parameter, whether another compressor holds it or its module does."""
        held = self._module._parameters.get(self._target_name)
        return self._earlier.target if held is None and self._earlier is not None else held


def attach_bare(
    model: nn.Module,
    names: Iterable[str],
    aliases: Mapping[str, Iterable[str]],
    wrappers: Mapping[str, ModuleWrapper],
) -> dict[str, BareTarget]:
    """Return a place for the mask of each parameter, by full name; one that has several names has one place.

    Parameters
    ----------
    model : torch.nn.Module
        Not wrapped at this moment.
    names : iterable of str
        Parameters' first names.
    aliases : mapping of str to iterable of str
        Their other names.
    wrappers : mapping of str to ModuleWrapper
        Those of earlier compressors, whose masks are taken over.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    targets: dict[str, BareTarget] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        targets[name] = BareTarget(modules[module], module, parameter, wrappers.get(module))
        for alias in aliases.get(name, ()):
            targets[alias] = targets[name]
    return targets


@torch.no_grad()
def project(targets: Iterable[BareTarget]) -> None:
    """Set what is masked to 0, in place."""
    values: dict[int, tuple[Tensor, Tensor]] = {}
    for place in targets:
        parameter, mask = place.target, place.mask
        if parameter is not None and mask is not None:
            values[id(parameter)] = (parameter, mask)
    by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, mask in values.values():
        parameters, masks = by_kind.setdefault((parameter.device, parameter.dtype), ([], []))
        parameters.append(parameter)
        masks.append(mask)
    for parameters, masks in by_kind.values():
        torch._foreach_mul_(parameters, masks)
