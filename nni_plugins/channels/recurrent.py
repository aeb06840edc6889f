"""Recurrent layers as one operator each.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` call one function of torch, which asks that input and weights be on the same
device, and then runs step by step: nothing that could be watched without data, and thousands of operators for a long
sequence. While a model is watched, the function is taken for the one operator that it is on a GPU, ``aten._cudnn_rnn``,
which says all that is to be known: the weights, the number of layers, whether there are two directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Function -> cuDNN's number of the kind of cell.
_KINDS = {torch.rnn_relu: 0, torch.rnn_tanh: 1, torch.lstm: 2, torch.gru: 3}

#: Called with the operator, its arguments, and a function that computes the result.
OnLayers = Callable[[Any, tuple, Callable[[], Any]], Any]


class _WholeLayers(TorchFunctionMode):
    def __init__(self, on_layers: OnLayers) -> None:
        super().__init__()
        self._on_layers = on_layers

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or kwargs or len(args) != 9:
            return func(*args, **kwargs)
        return _as_returned(kind, self._on_layers(_OPERATOR, _arguments(kind, args), lambda: func(*args)))


_OPERATOR = torch.ops.aten._cudnn_rnn.default


def _arguments(kind: int, args: tuple) -> tuple:
    """Return what the operator is called with: see ``aten::_cudnn_rnn``."""
    packed = isinstance(args[3], (list, tuple))  # with the sizes of the batch at each step: (x, sizes, h, weights, ...)
    if packed:
        x, sizes, state, weights, biased, layers, dropout, train, both = args
        first, steps = False, [int(size) for size in sizes] if not sizes.is_meta else []
    else:
        x, state, weights, biased, layers, dropout, train, both, first = args
        steps = []
    h, c = state if kind == 2 else (state, None)
    each = len(weights) // (layers * (2 if both else 1))
    projected = each - (4 if biased else 2)
    hidden = weights[1].shape[0] // (1, 1, 4, 3)[kind]
    projection = weights[each - 1].shape[0] if projected else 0
    return (
        x,
        list(weights),
        each,
        None,
        h,
        c,
        kind,
        hidden,
        projection,
        layers,
        first,
        dropout,
        train,
        both,
        steps,
        None,
    )


def _as_returned(kind: int, out: Any) -> Any:
    """Return the operator's result as the function gives it: ``(output, h)``, and ``c`` of an LSTM."""
    return tuple(out[:3]) if kind == 2 else tuple(out[:2])


@contextmanager
def whole_layers(model: nn.Module, on_layers: OnLayers) -> Iterator[None]:
    """Hand each call of a recurrent layer to ``on_layers`` as one operator, if ``model`` has such layers.

    Parameters
    ----------
    model
        The model that will run.
    on_layers
        Called with the operator, its arguments, and a function that computes the layer's result. What it returns begins
        with the output and the last states.
    """
    asked = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with _WholeLayers(on_layers) if asked else nullcontext():
        yield
