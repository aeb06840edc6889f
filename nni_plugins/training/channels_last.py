"""Channels last, without the convolutions whose gradient ends the process there.

oneDNN's gradient of a strided 1x1 convolution writes past its buffers where the picture is channels last and the
input has fewer channels than a vector register holds numbers: 2 to 7 with AVX2 crash torch 2.13 (1, and 8 and more, do
not; nor do larger kernels, groups, or a stride of 1). Such a convolution gets its input and weight contiguous instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VECTOR = 16
"""Numbers in the widest vector register (AVX-512)."""


def is_unsafe(module: nn.Module) -> bool:
    """Whether a module is a convolution that must not see channels last."""
    return (
        isinstance(module, (nn.Conv2d, nn.Conv3d))
        and all(size == 1 for size in module.kernel_size)
        and any(step > 1 for step in module.stride)
        and _held(module, "weight") is not None
        and 1 < _held(module, "weight").shape[1] < VECTOR  # as it is now: layers get narrower
    )


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Train within: convolutions that are unsafe now compute on contiguous tensors, the rest as it is."""
    unsafe = [module for module in model.modules() if is_unsafe(module)]
    with torch.no_grad():
        for module in unsafe:
            weight = _held(module, "weight")
            weight.data = _contiguous(weight.data)
    handles = [module.register_forward_pre_hook(_before) for module in unsafe]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_contiguous(value) if isinstance(value, Tensor) else value for value in inputs)


def _held(module: nn.Module, name: str) -> Any:
    """A parameter, which a compressor's wrapper may hold."""
    holder = getattr(module, "_nni_wrapper", None)
    found = None if holder is None else holder._parameters.get(name)
    return module._parameters.get(name) if found is None else found


def _contiguous(value: Tensor) -> Tensor:
    """A tensor with the strides of the plain format, which a size of 1 leaves open otherwise."""
    plain = torch.empty(value.shape, device="meta").stride()
    return value if value.stride() == plain else value.clone(memory_format=torch.contiguous_format)
