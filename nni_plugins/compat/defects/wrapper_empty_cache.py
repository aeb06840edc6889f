"""Every forward of every wrapped layer calls ``torch.cuda.empty_cache()``, which waits for the GPU.

It buys nothing: when memory is short, torch's allocator gives back what it caches and tries again by itself. The
name of the function that is called is exchanged for ``is_initialized``, which costs nothing.
"""

from __future__ import annotations

from typing import Any

from nni_plugins.compat.hook import Patch

NAME, HARMLESS = "empty_cache", "is_initialized"


def _defect(module: Any) -> bool:
    return NAME in module.ModuleWrapper.forward.__code__.co_names


def _mend(module: Any) -> None:
    forward = module.ModuleWrapper.forward
    names = tuple(HARMLESS if name == NAME else name for name in forward.__code__.co_names)
    forward.__code__ = forward.__code__.replace(co_names=names)


PATCH = Patch(
    name="wrapper-empty-cache",
    module="nni.compression.base.wrapper",
    mends="on CUDA, each forward of each wrapped layer empties the memory cache and waits for the GPU",
    defect=_defect,
    mend=_mend,
)
