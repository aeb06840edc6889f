"""A wrapped model cannot be deep-copied after a forward, as an exponential moving average (EMA) does.

At each forward the wrapper leaves the masked weight, a result of autograd, in the module; torch copies only leaves.
In the copy it is detached: the next forward of the copy replaces it anyway.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from nni_plugins.compat.hook import Patch

SPACES = ("pruning_target_spaces", "quantization_target_spaces", "distillation_target_spaces")
HOOK = "__deepcopy__"


def _places(owner: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Where NNI leaves tensors that autograd made: container, key or index, and value."""
    spaces = [space for kind in SPACES for space in getattr(owner, kind, {}).values()]
    for namespace in (owner._buffers, vars(owner), *map(vars, spaces)):
        for name, value in namespace.items():
            if isinstance(value, list):
                yield from ((value, index, item) for index, item in enumerate(value))
            yield namespace, name, value


def _deepcopy(owner: Any, memo: dict[int, Any]) -> Any:
    import torch

    swapped = [
        (container, key, value)
        for container, key, value in _places(owner)
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    hook = owner.__dict__.pop(HOOK)
    for container, key, value in swapped:
        container[key] = value.detach()
    try:
        copied = copy.deepcopy(owner, memo)
    finally:
        owner.__dict__[HOOK] = hook
        for container, key, value in swapped:
            container[key] = value
    copied.__dict__[HOOK] = MethodType(_deepcopy, copied)
    return copied


def _defect(module: Any) -> bool:
    torch = module.torch
    state = torch.get_rng_state()
    layer = torch.nn.Linear(1, 1)
    torch.set_rng_state(state)
    wrapper = module.ModuleWrapper(layer, "probe", {"pruning": {"target_names": ["weight"], "sparse_ratio": 0.5}})
    wrapper.wrap()
    layer.weight = wrapper.weight * 1.0
    try:
        copy.deepcopy(layer)
    except RuntimeError:
        return True
    return False


def _mend(module: Any) -> None:
    wrapper_class = module.ModuleWrapper
    their_wrap, their_unwrap = wrapper_class.wrap, wrapper_class.unwrap

    @functools.wraps(their_wrap)
    def wrap(self: Any) -> None:
        their_wrap(self)
        for owner in (self.module, self):
            owner.__dict__[HOOK] = MethodType(_deepcopy, owner)

    @functools.wraps(their_unwrap)
    def unwrap(self: Any) -> None:
        their_unwrap(self)
        for owner in (self.module, self):
            owner.__dict__.pop(HOOK, None)

    wrapper_class.wrap, wrapper_class.unwrap = wrap, unwrap


PATCH = Patch(
    name="wrapped-deepcopy",
    module="nni.compression.base.wrapper",
    mends="a model with masks cannot be deep-copied after a forward, as EMA does ('Only Tensors created explicitly "
    "by the user support the deepcopy protocol')",
    defect=_defect,
    mend=_mend,
)
