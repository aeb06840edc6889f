"""Watching a run: every operator that one forward calls, with its tensors and the module that called it.

The run is made on tensors without data under a ``TorchDispatchMode``, so nothing is computed, and nothing that runs can
fail to be watched: a model that does not run without data is run on fake tensors, and one whose forward looks at values
(``if x.sum() > 0``) on real ones.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nni_plugins.channels.caches import functions_forget
from nni_plugins.channels.flexible import all_flexible
from nni_plugins.channels.preserve import drop_caches, preserved, set_mode
from nni_plugins.channels.recurrent import whole_layers
from nni_plugins.channels.shapes import result_without_data

OnOperator = Callable[[Any, tuple, dict, Any, str], object]
OnModule = Callable[[str, Any, Any], None]
OnEnter = Callable[[str, tuple, dict], None]
OnLeave = Callable[[str, Any], None]
Data = Literal["none", "fake", "real"]
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


_META = torch.device("meta")
_KEEPS_DEVICE = frozenset([torch.ops.aten._to_copy.default])
_LOOKS = frozenset([torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default])
#: Where nearly all the time of a run goes.
_PRODUCTS = frozenset(f"aten.{name}" for name in "convolution mm addmm bmm baddbmm _grouped_mm".split())


@cache
def _name(func: Any) -> str:
    return str(func.overloadpacket)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is nothing but calls of others."""
    name = func.name()
    if name.startswith("prim::"):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


@cache
def _argument_names(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


def as_arguments(dummy_input: Any) -> tuple[tuple, dict]:
    """Return ``dummy_input`` as positional and keyword arguments, as NNI's ``ModelSpeedup`` takes it.

    A tensor is one argument, a tuple or list several, a dict keyword arguments.
    """
    if isinstance(dummy_input, dict):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return tuple(dummy_input), {}
    return (dummy_input,), {}


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to its tensors: in tuples, lists, dicts and dataclasses, nested."""

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return function(item)
        if not is_dataclass(item) or isinstance(item, type):
            return item
        made = copy(item)
        for entry in fields(item):
            if hasattr(item, entry.name):
                object.__setattr__(made, entry.name, map_tensors(function, getattr(item, entry.name)))
        return made

    return tree_map(leaf, value)


class _Recorder(TorchDispatchMode):
    """Calls back after each operator; with ``meta``, every tensor that an operator is given is one without data.

    With ``products`` False, those that take the time give zeros.
    """

    def __init__(self, on_operator: OnOperator, stack: list[str], *, meta: bool, products: bool = True) -> None:
        super().__init__()
        self._products = products
        self._on_operator = on_operator
        self._stack = stack
        self._meta = meta
        self._paused = False
        self._shadows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if _is_composite(func):  # under inference mode those come whole
            with self:
                return func.decompose(*args, **kwargs)
        if self._meta:
            out = self._without_data(func, args, kwargs)
        elif self._products or _name(func) not in _PRODUCTS:
            out = func(*args, **kwargs)
        else:
            out = self._zeros(func, args, kwargs)
        told = self._on_operator(func, args, kwargs, out, self._stack[-1])
        return told if isinstance(told, float) and isinstance(out, float) else out

    def _zeros(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return what a product would, at its size, full of zeros."""
        out = result_without_data(_name(func), tuple(_hollow(arg) for arg in args), kwargs)
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **kwargs) if out is NotImplemented else torch.zeros_like(out, device=device)

    def as_one(self, func: Any, args: tuple, compute: Callable[[], Any]) -> Any:
        """Record operator ``func``, and none of those that ``compute`` runs to have its result."""
        without_data = self._meta or any(isinstance(a, FakeTensor) for a in args)
        self._paused = True
        try:
            out = result_without_data(_name(func), tuple(map(self._shadowed, args)), {}) if without_data else compute()
        finally:
            self._paused = False
        self._on_operator(func, args, {}, out, self._stack[-1])
        return out

    def _without_data(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        elif not any(isinstance(a, (torch.Tensor, list, tuple)) for a in args) and "device" in _argument_names(func):
            kwargs = {**kwargs, "device": _META}  # a factory on the default device
        elif func is torch.ops.aten.lift_fresh.default or func is torch.ops.aten.lift_fresh_copy.default:
            return self._shadow(args[0])
        elif func in _LOOKS:
            raise NeedsValues(f"{func} reads the values of a tensor")
        elif "device" in _argument_names(func) and func not in _KEEPS_DEVICE:
            kwargs = {**kwargs, "device": _META}
        shadowed = [self._shadowed(a) for a in args]
        named = {key: self._shadowed(value) for key, value in kwargs.items()}
        out = result_without_data(_name(func), tuple(shadowed), named)
        if out is NotImplemented:
            out = func(*shadowed, **named)
        return args[0] if out is shadowed[0] and args else out

    def _shadowed(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and self._meta:
            return value if value.is_meta else self._shadow(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._shadowed(item) for item in value])
        return value

    def _shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        found = self._shadows.get(id(tensor))
        if found is None:
            shadow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
            found = self._shadows[id(tensor)] = (tensor, shadow)  # the tensor too, else its id may be given to another
        return found[1]


# torch wraps each mode for its compiler, which it imports for that at the first call: one to two seconds for nothing.
_Recorder.__torch_dispatch__ = inspect.unwrap(_Recorder.__torch_dispatch__)  # type: ignore[method-assign]


def _hollow(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


class NeedsValues(RuntimeError):
    """A forward looked at the values of a tensor that has none."""


@contextmanager
def _module_stack(
    model: nn.Module, on_module: OnModule | None, on_span: tuple[OnEnter, OnLeave] | None
) -> Iterator[list[str]]:
    """Keep the name of the module whose forward is running, by global hooks.

    Only keyword arguments are seen by hooks of the modules themselves, since global ones are not given them everywhere.
    """
    names = {module: name for name, module in model.named_modules()}
    leaves = {module: name for module, name in names.items() if not module._modules} if on_module is not None else {}
    spanned = _with_parameters(model, names) if on_span is not None else {}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        if on_module is not None and module in leaves:
            on_module(leaves[module], args, output)
        if on_span is not None and module in spanned:
            on_span[1](spanned[module], output)

    def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if on_span is not None:
            on_span[0](spanned[module], args, kwargs)

    own = [module.register_forward_pre_hook(entered, prepend=True, with_kwargs=True) for module in spanned]
    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield stack
    finally:
        for handle in (before, after, *own):
            handle.remove()


def _with_parameters(model: nn.Module, names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Return the modules below ``model`` that hold parameters, or have some below them."""
    holders = {""}
    for name, _ in model.named_parameters(remove_duplicate=False):
        while (name := name.rpartition(".")[0]) not in holders:
            holders.add(name)
    return {
        module: name
        for module, name in names.items()
        if name and name in holders and not isinstance(module, torch.jit.ScriptModule)
    }


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Switch off the fused inference path of MultiheadAttention, which hides its operators."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _any_batch_size() -> Iterator[None]:
    """Let batch norms train on a single value, as that of one image after a pooling: nothing is trained here."""
    torch_functional: Any = functional
    check = torch_functional._verify_batch_size
    torch_functional._verify_batch_size = lambda size: None
    try:
        yield
    finally:
        torch_functional._verify_batch_size = check


@contextmanager
def _norms_of_nothing() -> Iterator[None]:
    """Let a batch norm of no samples (of no boxes) read its statistics as any other, where torch would not."""
    torch_module: Any = torch
    norm = torch_module.batch_norm

    def batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any) -> Any:
        if training or mean is None or x.numel():
            return norm(x, weight, bias, mean, variance, training, *rest)
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, *rest[:2])[0]

    torch_module.batch_norm = batch_norm
    try:
        yield
    finally:
        torch_module.batch_norm = norm


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Let torch not log, with a traceback, each operator that its fake tensors cannot do: real data is tried next."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_recorded(
    model: nn.Module,
    dummy_input: Any,
    on_operator: OnOperator,
    *,
    on_input: Callable[[torch.Tensor], None] | None = None,
    on_module: OnModule | None = None,
    on_span: tuple[OnEnter, OnLeave] | None = None,
    data: Data = "none",
    training: bool = False,
    products: bool = True,
) -> Any:
    """Run ``model`` once in eval mode without gradients, calling ``on_operator`` after each ATen operator.

    Modules that have a forward of flexible width run with it. The model is left exactly as it was: modes, hooks,
    attributes, buffers and the random state.

    Parameters
    ----------
    model
        The model. Its parameters stay where they are; on fake tensors they are never read.
    dummy_input
        A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    on_operator
        Called with ``(func, args, kwargs, output, module_name)``. Where the output is a number read from a tensor, the
        forward goes on with the number that it returns.
    on_input
        Called with each input tensor as the run sees it.
    on_module
        Called after each call of a module without children, with its name, arguments and output.
    on_span
        Called before each call of a module that holds parameters, itself or below it, with its name and arguments; and
        after it, with its name and output.
    data
        What the run is made on: 'none', tensors of the device "meta", is the fastest; 'fake', torch's fake tensors,
        keeps devices; 'real' computes.
    training
        Run in training mode instead.
    products
        Whether a run that computes works out convolutions and matrix products too; else they give zeros.

    Returns
    -------
    Any
        What the model returned.
    """
    args, kwargs = as_arguments(dummy_input)
    with (
        preserved(model, buffers=data != "none"),
        torch.no_grad(),
        unfused_attention(),
        _any_batch_size() if training else nullcontext(),
        _norms_of_nothing(),
        all_flexible(model),
        functions_forget(model),
        ExitStack() as quiet,
        _module_stack(model, on_module, on_span) as stack,
    ):
        drop_caches(model)
        set_mode(model, training)
        mode: Any = nullcontext()
        if data == "none":
            args, kwargs = map_tensors(lambda t: t.detach().to(_META), (args, kwargs))
        elif data == "fake":
            quiet.enter_context(_quiet_fakes())
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            args, kwargs = map_tensors(mode.from_tensor, (args, kwargs))
        if on_input is not None:
            map_tensors(on_input, (args, kwargs))
        recorder = _Recorder(on_operator, stack, meta=data == "none", products=products)
        with mode, recorder, whole_layers(model, recorder.as_one):
            return model(*args, **kwargs)


def has_no_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a watched run stands for one, and is none of the model's own."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def on_least_data(run: Callable[[Data], Result]) -> Result:
    """Call ``run`` with 'none', then, where that fails, with 'fake', and with 'real' where a forward looks at values.

    The error of the last try is raised: it is the model's own.
    """
    kinds: tuple[Data, ...] = ("none", "fake")
    for data in kinds:
        try:
            return run(data)
        except StopWatching:
            raise
        except Exception as error:
            _logger.debug("watching on %s data failed: %s", data, error)
    return run("real")


class StopWatching(Exception):
    """Raised by a callback to end a run early; it is no failure of the run."""
