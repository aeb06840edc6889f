"""Watching a run: every operator that one forward calls, with its tensors and the module that called it.

The run is made on fake tensors (shapes without data) under a ``TorchDispatchMode``, so nothing is computed, and nothing
that runs can fail to be watched. A model whose forward looks at values (``if x.sum() > 0``) is run on real tensors instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nni_plugins.channels.preserve import preserved

OnOperator = Callable[[Any, tuple, dict, Any, str], None]
OnModule = Callable[[str, Any, Any], None]


def as_arguments(dummy_input: Any) -> tuple[tuple, dict]:
    """Return ``dummy_input`` as positional and keyword arguments, as NNI's ``ModelSpeedup`` takes it.

    A tensor is one argument, a tuple or list several, a dict keyword arguments.
    """
    if isinstance(dummy_input, dict):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return tuple(dummy_input), {}
    return (dummy_input,), {}


class _Recorder(TorchDispatchMode):
    def __init__(self, on_operator: OnOperator, stack: list[str]) -> None:
        super().__init__()
        self._on_operator = on_operator
        self._stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._on_operator(func, args, kwargs, out, self._stack[-1])
        return out


@contextmanager
def _module_stack(model: nn.Module, on_module: OnModule | None) -> Iterator[list[str]]:
    """Keep the name of the module whose forward is running, by global hooks: no module is touched."""
    names = {module: name for name, module in model.named_modules()}
    leaves = {module: name for module, name in names.items() if not module._modules} if on_module is not None else {}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        if on_module is not None and module in leaves:
            on_module(leaves[module], args, output)

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield stack
    finally:
        before.remove()
        after.remove()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Switch off the fused inference path of MultiheadAttention, which hides its operators."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def run_recorded(
    model: nn.Module,
    dummy_input: Any,
    on_operator: OnOperator,
    *,
    on_input: Callable[[torch.Tensor], None] | None = None,
    on_module: OnModule | None = None,
    fake: bool = True,
) -> Any:
    """Run ``model`` once in eval mode without gradients, calling ``on_operator`` after each ATen operator.

    The model is left exactly as it was: modes, hooks, attributes, buffers and the random state.

    Parameters
    ----------
    model
        The model. Its parameters stay where they are; on fake tensors they are never read.
    dummy_input
        A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    on_operator
        Called with ``(func, args, kwargs, output, module_name)``.
    on_input
        Called with each input tensor as the run sees it.
    on_module
        Called after each call of a module without children, with its name, arguments and output.
    fake
        Run on fake tensors.

    Returns
    -------
    Any
        What the model returned.
    """
    args, kwargs = as_arguments(dummy_input)
    with preserved(model, buffers=not fake), torch.no_grad(), _unfused_attention(), _module_stack(model, on_module) as stack:
        model.eval()
        if not fake:
            if on_input is not None:
                tree_map_only(torch.Tensor, on_input, (args, kwargs))
            with _Recorder(on_operator, stack):
                return model(*args, **kwargs)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        if on_input is not None:
            tree_map_only(torch.Tensor, on_input, (args, kwargs))
        with mode, _Recorder(on_operator, stack):
            return model(*args, **kwargs)


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def needs_values(error: Exception) -> bool:
    """Whether ``error`` says that a forward looked at the values of a fake tensor."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    kinds = (DataDependentOutputException, DynamicOutputShapeException)
    while error is not None:
        if isinstance(error, kinds) or "data-dependent" in str(error).lower() or "FakeTensor" in str(error):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False
