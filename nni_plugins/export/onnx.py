"""ONNX: float or with trained 8-bit scales (QDQ), checked in onnxruntime against the PyTorch model."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from nni_plugins.export.agreement import (
    Exported,
    free_batch,
    largest_error,
    on_cpu,
    one_line,
    quiet,
    split_arguments,
    with_batch,
    with_free_batch,
)
from nni_plugins.export.errors import ExportError

METADATA = "nni_plugins"
"""The key of the file's metadata that holds what is said about the model, as JSON."""


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
        Largest difference that is allowed, in shares of the output's size; of a model in half precision, at least 8
        times the resolution of its numbers. With grids it is not checked here, since rounding to a grid is not
        continuous: compare the task's metric.
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
    held = copy.deepcopy(reference).cpu().eval() if reference is not None else model
    inputs = on_cpu(dummy_input)

    def make(dynamic: bool, note: str) -> Exported:
        return _export(model, held, inputs, path, dynamic, grids, opset, metadata, tolerance, note)

    return with_free_batch(make, dynamic_batch)


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
    """Return what a session is fed: named tensors by their names, others in order."""
    names = [item.name for item in session.get_inputs()]
    if isinstance(inputs, Mapping) and set(inputs) == set(names):
        return {name: inputs[name].detach().cpu().numpy() for name in names}
    leaves = [leaf.detach().cpu().numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
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
    """Raise one line where a package of the extras ``export`` or ``openvino`` is missing."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if "openvino" in missing else "export"
        raise ExportError(f"{', '.join(missing)} is not installed; pip install 'nni-plugins[{extra}]'")


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

    args, kwargs = split_arguments(with_batch(dummy_input, 2) if dynamic else dummy_input)
    names = _input_names(model, args, kwargs)
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
                dynamic_shapes=free_batch(args, kwargs) if dynamic else None,
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
        try:
            session = session_of(part)
        except ExportError as error:
            raise ExportError(f"{str(error).replace(str(part), path.name)}{_hint(model)}") from error
        errors = largest_error(
            reference, lambda given: session.run(None, feed_of(session, given)), dummy_input, dynamic, path.name
        )
        allowed = math.inf if grids else max(tolerance, _resolution(model))
        if not errors[1] <= allowed or math.isinf(errors[0]):
            raise ExportError(
                f"{path.name} computes something else: it is off by {errors[1]:.2g} of the output's size in "
                f"onnxruntime, and {allowed:.2g} is allowed"
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


def _resolution(model: nn.Module) -> float:
    """Eight times the resolution of the coarsest numbers below 32 bits that a model holds; 0 where it has none."""
    kinds = {item.dtype for item in (*model.parameters(), *model.buffers()) if item.is_floating_point()}
    return max((8 * torch.finfo(kind).eps for kind in kinds if torch.finfo(kind).bits < 32), default=0.0)


def _hint(model: nn.Module) -> str:
    return "; export model.float()" if _resolution(model) else ""


def _strip(proto: Any) -> None:
    """Take out what the exporter noted for debugging, and attributes that say what ONNX's schema says already.

    Together it is larger than the weights of a small model.
    """
    from onnx import defs, helper

    versions = {item.domain: item.version for item in proto.opset_import}
    del proto.graph.value_info[:]
    for holder in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.functions):
        holder.ClearField("doc_string")
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]
    for item in (*proto.graph.input, *proto.graph.output):
        item.ClearField("doc_string")
    for node in proto.graph.node:
        if node.domain in versions and defs.has(node.op_type, versions[node.domain], node.domain):
            known = defs.get_schema(node.op_type, versions[node.domain], node.domain).attributes
            for held in list(node.attribute):
                usual = known[held.name].default_value if held.name in known else None
                if usual is not None and usual.type and _same(helper, held, usual):
                    node.attribute.remove(held)


def _same(helper: Any, one: Any, other: Any) -> bool:
    return one.type == other.type and helper.get_attribute_value(one) == helper.get_attribute_value(other)


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
