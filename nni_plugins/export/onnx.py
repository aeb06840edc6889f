"""ONNX: float or with trained 8-bit scales (QDQ), checked in onnxruntime against the PyTorch model."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from nni_plugins.export.errors import ExportError

METADATA = "nni_plugins"
"""The key of the file's metadata that holds what is said about the model, as JSON."""
BATCHES = (1, 2, 5)
"""Sizes at which a file with a free batch size is checked."""


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
        Largest difference of the outputs in onnxruntime, absolute and in shares of the output's size.
    bytes
        Size of the file.
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


def export_onnx(
    model: nn.Module,
    dummy_input: Any,
    path: str | Path,
    *,
    grids: Mapping[str, Mapping[str, Any]] | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
    reference: nn.Module | None = None,
) -> Exported:
    """Write a model as ONNX and check the file in onnxruntime.

    Parameters
    ----------
    model
        Exported in evaluation mode on the CPU, as a copy; wrappers must be off.
    dummy_input
        A tensor, a tuple of positional or a dict of keyword arguments. The first dimension is the batch.
    path
        The file; its folder is made.
    grids
        Of :class:`~nni_plugins.training.quantize.Quantized`: ``{module: {weight, input, output}}``. Weights are stored
        as int8 and read by DequantizeLinear; activations pass QuantizeLinear and DequantizeLinear.
    dynamic_batch
        Leave the size of the batch free. Where the model does not allow it, it is fixed, and the result says why.
    opset
        Of ONNX; the exporter's own by default.
    metadata
        Plain data, kept in the file under ``nni_plugins``.
    tolerance
        Largest difference that is allowed, in shares of the output's size. With grids it is not checked here, since
        rounding to a grid is not continuous: compare the task's metric.
    reference
        What the file is compared with; the model by default (with grids: the model that rounds).

    Raises
    ------
    ExportError
        A package is missing, the exporter fails, or the file computes something else.
    """
    require("onnx", "onnxruntime", "onnxscript")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu().eval()
    dummy_input = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, dummy_input)
    held = copy.deepcopy(reference).cpu().eval() if reference is not None else model
    note = ""
    if dynamic_batch:
        try:
            return _export(model, held, dummy_input, path, True, grids, opset, metadata, tolerance, note)
        except ExportError as error:
            note = f"the batch size is fixed: {error}"
    return _export(model, held, dummy_input, path, False, grids, opset, metadata, tolerance, note)


def run_onnx(path: str | Path, inputs: Any, threads: int = 1) -> list[Any]:
    """Run a file in onnxruntime on nested tensors, in the order of its inputs; returns arrays."""
    session = session_of(path, threads)
    return session.run(None, feed_of(session, inputs))


def session_of(path: str | Path, threads: int = 1) -> Any:
    """Open a file in onnxruntime's CPU provider."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own kinds
        raise ExportError(f"{path} cannot be opened in onnxruntime: {one_line(error)}") from error


def feed_of(session: Any, inputs: Any) -> dict[str, Any]:
    """Return what a session is fed: the tensors in nested inputs, by the session's names, in order."""
    leaves = [leaf.detach().cpu().numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [item.name for item in session.get_inputs()]
    if len(leaves) != len(names):
        raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), and was given {len(leaves)}")
    return dict(zip(names, leaves, strict=True))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what :func:`export_onnx` was told about the model; empty where a file has none."""
    require("onnx")
    import onnx

    loaded = onnx.load(str(path), load_external_data=False)
    found = {item.key: item.value for item in loaded.metadata_props}
    return json.loads(found[METADATA]) if METADATA in found else {}


def require(*packages: str) -> None:
    """Raise one line where a package of the extra ``export`` is missing."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} is not installed; pip install 'nni-plugins[export]'")


def _export(
    model: nn.Module,
    reference: nn.Module,
    dummy_input: Any,
    path: Path,
    dynamic: bool,
    grids: Mapping[str, Mapping[str, Any]] | None,
    opset: int | None,
    metadata: Mapping[str, Any] | None,
    tolerance: float,
    note: str,
) -> Exported:
    import onnx

    sample = with_batch(dummy_input, 2) if dynamic else dummy_input
    args, kwargs = ((), sample) if isinstance(sample, dict) else (positional(sample), {})
    names = _input_names(model, args, kwargs)
    shapes: Any = None
    if dynamic:
        shapes = free_batch(args, kwargs)
    part = path.with_name(path.name + ".part")
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                verbose=False,
                input_names=names,
                opset_version=opset,
                dynamic_shapes=shapes,
            )
        assert program is not None
        proto = program.model_proto
        if grids:
            from nni_plugins.export.qdq import insert

            insert(proto, grids, {name: model.get_submodule(name) for name in grids})
        _strip(proto)
        said = {METADATA: json.dumps(metadata or {}, default=str, separators=(",", ":"))}
        onnx.helper.set_model_props(proto, said)
        onnx.checker.check_model(proto)
        part.write_bytes(proto.SerializeToString())
        errors = _compare(reference, dummy_input, part, dynamic)
        if not grids and not errors[1] <= tolerance:
            raise ExportError(
                f"{path.name} computes something else: it is off by {errors[1]:.2g} of the output's size in "
                f"onnxruntime, and {tolerance:g} is allowed"
            )
        os.replace(part, path)
    except ExportError:
        raise
    except Exception as error:  # the exporter, the checker and protobuf have kinds of their own
        raise ExportError(f"{path.name} cannot be exported: {one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return Exported(
        path=str(path),
        inputs=tuple(item.name for item in proto.graph.input),
        outputs=tuple(item.name for item in proto.graph.output),
        dynamic_batch=dynamic,
        note=note,
        max_error=errors[0],
        relative_error=errors[1],
        bytes=path.stat().st_size,
        metadata=dict(metadata or {}),
    )


def _strip(proto: Any) -> None:
    """Take out what the exporter noted for debugging: it is larger than the weights of a small model."""
    del proto.graph.value_info[:]
    for holder in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.functions):
        holder.doc_string = ""
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]
    for item in (*proto.graph.input, *proto.graph.output):
        item.doc_string = ""


@torch.no_grad()
def _compare(reference: nn.Module, dummy_input: Any, path: Path, dynamic: bool) -> tuple[float, float]:
    """Largest difference of the outputs, absolute and in shares of each output's size, over sizes of the batch."""
    session = session_of(path)
    worst, relative = 0.0, 0.0
    for size in BATCHES if dynamic else (None,):
        inputs = _noise(dummy_input if size is None else with_batch(dummy_input, size))
        wanted = reference(**inputs) if isinstance(inputs, dict) else reference(*positional(inputs))
        try:
            found = session.run(None, feed_of(session, inputs))
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(f"{path.stem} does not run in onnxruntime at batch {size}: {one_line(error)}") from error
        leaves = [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, Tensor)]
        if len(leaves) != len(found):
            raise ExportError(f"{path.stem} has {len(found)} outputs, and the model {len(leaves)}")
        for ours, theirs in zip(leaves, found, strict=True):
            other = torch.as_tensor(theirs)
            if tuple(other.shape) != tuple(ours.shape):
                raise ExportError(f"{path.stem} returns {list(other.shape)} at batch {size}, not {list(ours.shape)}")
            off = float((ours.double() - other.double()).abs().max()) if ours.numel() else 0.0
            worst = max(worst, off)
            relative = max(relative, off / max(float(ours.double().abs().max()) if ours.numel() else 0.0, 1e-12))
    return worst, relative


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


def free_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Which dimensions are free, as ``dynamic_shapes`` of torch's exporters: the first of each tensor."""
    auto = torch.export.Dim.DYNAMIC
    spec = [
        tree_map(lambda leaf: {0: auto} if isinstance(leaf, Tensor) and leaf.dim() else None, item)
        for item in (kwargs.values() if kwargs else args)
    ]
    return dict(zip(kwargs, spec, strict=True)) if kwargs else tuple(spec)


def positional(value: Any) -> tuple:
    """Return positional arguments of a dummy input."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _input_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str] | None:
    """The names of forward's arguments, where each is one tensor."""
    import inspect

    if kwargs:
        return list(kwargs) if all(isinstance(item, Tensor) for item in kwargs.values()) else None
    try:
        names = list(inspect.signature(model.forward).parameters)[: len(args)]
    except (TypeError, ValueError):
        return None
    flat = len(tree_flatten(tuple(args))[0]) == len(args) == len(names)
    return names if flat and not any(name in ("args", "kwargs") for name in names) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter talks of packages that are not installed, and of what it will do otherwise one day."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def one_line(error: BaseException) -> str:
    """Return the first line of an error, or its kind."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:300]
