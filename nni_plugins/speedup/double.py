"""The proof in double precision, of a forward that makes much of rounding.

Of boxes whose scores are equal but for rounding, a detector keeps one or the other; a recurrent forward makes a little
rounding larger at each step. So the outputs of the compact model and of the masked one may differ in single precision
though all that was removed was masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nni_plugins.channels.watch import map_tensors
from nni_plugins.speedup import fold
from nni_plugins.speedup.compact import Compaction
from nni_plugins.speedup.masked_run import masks_in_force
from nni_plugins.speedup.verify import largest_error, outputs_of

#: What a report says of it, of a forward that looks at values and of others.
PICKS = "proved in double precision: in the model's own, rounding decides what the forward picks"
GROWS = "proved in double precision: in the model's own, rounding grows beyond what is allowed"


def errors_in_double(
    model: nn.Module,
    inputs: Any,
    masks: Mapping[str, torch.Tensor],
    compaction: Compaction,
    folded: fold.Applied,
    constants: list[fold.FoldedBias],
) -> tuple[tuple[float, float], fold.Applied] | None:
    """Return the largest error, absolute and as a share of the output, and what is folded now.

    None where the forward does not run in double precision.
    """
    graph = compaction.plan.graph
    if any(t.dtype == torch.float64 for t in model.parameters()):
        return None  # it is what was seen already
    inputs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        with _in_double(model):
            actual = outputs_of(model, inputs)
    except RuntimeError:  # it makes tensors of single precision
        return None
    fold.remove(model, folded)
    with compaction.suspended(), masks_in_force(model, masks, graph), _in_double(model):
        expected = outputs_of(model, inputs)
    return largest_error(actual, expected), fold.apply(model, constants)


_LOW = frozenset([torch.float32, torch.float16, torch.bfloat16])


class _AllDouble(TorchDispatchMode):
    """What a forward asks for in lower precision (``x.float()``), it is given in double precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _LOW:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


# as in channels/watch.py: else torch imports its compiler
_AllDouble.__torch_dispatch__ = inspect.unwrap(_AllDouble.__torch_dispatch__)  # type: ignore[method-assign]


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [(tensor, tensor.data) for tensor in tensors]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # of what the forward makes itself
        for tensor, data in before:
            tensor.data = data.double()
        with _AllDouble():
            yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in before:
            tensor.data = data
