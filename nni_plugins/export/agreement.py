"""Whether a file computes what its model computes: the same inputs through both, at several sizes of the batch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nni_plugins.export.errors import ExportError

BATCHES = (1, 2, 5)
"""Sizes at which a file with a free batch size is checked."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the model.

    Attributes
    ----------
    path
        The file.
    inputs, outputs
        Names, in order.
    dynamic_batch
        Whether the size of the batch is free.
    note
        Why it is not.
    max_error, relative_error
        Largest difference of the outputs, absolute and in shares of the output's size.
    bytes
        Size of the file.
    metadata
        What is kept in the file.
    """

    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    note: str
    max_error: float
    relative_error: float
    bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"inputs": list(self.inputs), "outputs": list(self.outputs)}


def with_free_batch(make: Callable[[bool, str], Made], dynamic: bool) -> Made:
    """Make a file with a free batch size, or where that fails, with a fixed one and the reason.

    Parameters
    ----------
    make
        Called with whether the batch is free, and with a note.
    dynamic
        Whether to try it.
    """
    note = ""
    if dynamic:
        try:
            return make(True, note)
        except ExportError as error:
            note = f"the batch size is fixed: {error}"
    return make(False, note)


@torch.no_grad()
def largest_error(
    reference: nn.Module, run: Callable[[Any], Sequence[Any]], dummy_input: Any, dynamic: bool, name: str
) -> tuple[float, float]:
    """Return the largest difference of the outputs, absolute and in shares of each output's size.

    Parameters
    ----------
    reference
        The model.
    run
        From inputs to what the file returns: tensors or arrays, in order.
    dummy_input
        Floats are drawn anew around it.
    dynamic
        Compare at several sizes of the batch.
    name
        Of the file, for messages.

    Raises
    ------
    ExportError
        It does not run, or returns other shapes. A value that is not a number where the model has one is an infinite
        difference.
    """
    worst, relative = 0.0, 0.0
    for size in BATCHES if dynamic else (None,):
        inputs = _noise(dummy_input if size is None else with_batch(dummy_input, size))
        wanted = reference(**inputs) if isinstance(inputs, dict) else reference(*positional(inputs))
        at = "" if size is None else f" at batch {size}"
        try:
            found = run(inputs)
        except ExportError:
            raise
        except Exception as error:  # every runtime has kinds of its own
            raise ExportError(f"{name} does not run{at}: {one_line(error)}") from error
        leaves = [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, Tensor)]
        if len(leaves) != len(found):
            raise ExportError(f"{name} has {len(found)} outputs, and the model {len(leaves)}")
        for ours, theirs in zip(leaves, map(torch.as_tensor, found), strict=True):
            if tuple(theirs.shape) != tuple(ours.shape):
                raise ExportError(f"{name} returns {list(theirs.shape)}{at}, not {list(ours.shape)}")
            off = _difference(ours.double(), theirs.double())
            worst = max(worst, off)
            extent = ours.double().nan_to_num(0.0, 0.0, 0.0).abs()
            relative = max(relative, off / max(float(extent.max()) if extent.numel() else 0.0, 1e-12))
    return worst, relative


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; values that are not finite on both sides alike do not differ, on one side infinitely."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    off = torch.where(same, 0.0, (ours - theirs).abs())
    return float(off.nan_to_num(math.inf, math.inf).max()) if off.numel() else 0.0


def with_batch(inputs: Any, size: int) -> Any:
    """Return nested tensors with so many rows: the first ones repeated."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        return leaf[torch.arange(size) % len(leaf)]

    return tree_map(resized, inputs)


def _noise(inputs: Any) -> Any:
    """Floats drawn anew around the given ones, so that an example of zeros hides nothing; whole numbers as they are."""
    generator = torch.Generator().manual_seed(0)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        spread = leaf.float().std().item() if leaf.numel() > 1 else 1.0
        noise = torch.randn(leaf.shape, generator=generator) * (spread if spread > 0 else 1.0)
        return (leaf.float().mean().item() + noise).to(leaf.dtype)

    return tree_map(drawn, inputs)


def split_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a dummy input."""
    return ((), inputs) if isinstance(inputs, dict) else (positional(inputs), {})


def positional(value: Any) -> tuple:
    """Return positional arguments of a dummy input that is no dictionary."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def free_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Which dimensions are free, as ``dynamic_shapes`` of torch's exporters: the first of each tensor."""
    auto = torch.export.Dim.DYNAMIC
    spec = [
        tree_map(lambda leaf: {0: auto} if isinstance(leaf, Tensor) and leaf.dim() else None, item)
        for item in (kwargs.values() if kwargs else args)
    ]
    return dict(zip(kwargs, spec, strict=True)) if kwargs else tuple(spec)


def on_cpu(inputs: Any) -> Any:
    """Return nested tensors on the CPU, without gradients."""
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk of packages that are not installed, of what they leave alone, and of what they will do one day."""
    loggers = {name: logging.getLogger(name) for name in ("torch.onnx", "onnxscript")}
    before = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])


def one_line(error: BaseException) -> str:
    """Return the first line of an error, or its kind."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:300]
