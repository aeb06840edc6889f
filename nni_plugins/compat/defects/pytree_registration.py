"""Importing NNI's speedup registers torch.fx's immutable containers over torch's own registration, and warns."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from nni_plugins.compat.hook import Patch


def _prepare(module: ModuleType) -> Callable[[], None] | None:
    """Let a container that torch knows already be, while NNI's module runs."""
    import torch.utils._pytree as pytree
    from torch.fx.immutable_collections import immutable_dict, immutable_list

    if not {immutable_dict, immutable_list} <= set(pytree.SUPPORTED_NODES):
        return None
    register = pytree._register_pytree_node

    def register_unknown(cls: Any, *args: Any, **kwargs: Any) -> None:
        if cls not in pytree.SUPPORTED_NODES:
            register(cls, *args, **kwargs)

    pytree._register_pytree_node = register_unknown

    def undo() -> None:
        pytree._register_pytree_node = register
        if vars(module).get("_register_pytree_node") is register_unknown:
            vars(module)["_register_pytree_node"] = register

    return undo


PATCH = Patch(
    name="pytree-registration",
    module="nni.compression.speedup.utils",
    mends="importing nni.compression.speedup replaces torch's handling of fx containers, with four warnings",
    prepare=_prepare,
)
