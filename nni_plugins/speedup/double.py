"""The proof in double precision, of a forward that goes on from what it finds in values.

Of boxes whose scores are equal but for rounding, a detector keeps one or the other. So the outputs of the compact model
and of the masked one may differ in single precision though all that was removed was masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.watch import map_tensors
from nni_plugins.speedup import fold
from nni_plugins.speedup.compact import Compaction
from nni_plugins.speedup.masked_run import masks_in_force
from nni_plugins.speedup.verify import largest_error, outputs_of

#: What a report says of it.
NOTE = "proved in double precision: in the model's own, rounding decides what the forward picks"


def errors_in_double(
    model: nn.Module,
    inputs: Any,
    masks: Mapping[str, torch.Tensor],
    compaction: Compaction,
    folded: fold.Applied,
    constants: list[fold.FoldedBias],
) -> tuple[tuple[float, float], fold.Applied] | None:
    """Return the largest error, absolute and as a share of the output, and what is folded now.

    None where the forward takes its way without looking at values, or does not run in double precision.
    """
    graph = compaction.plan.graph
    if graph.trace.data != "real":
        return None
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


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in before:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
