"""Scales into an ONNX graph: QuantizeLinear and DequantizeLinear where an integer kernel looks for them.

Placement follows what onnxruntime and TensorRT document for explicit quantisation: a pair on each activation that a
convolution or matrix product reads, weights stored as int8 before one DequantizeLinear, by output channel; a pair on
what a residual addition reads. Biases stay in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nni_plugins.export.errors import ExportError

LAYERS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""Operators that hold a weight, and which of their inputs it is."""


def insert(proto: Any, grids: Mapping[str, Mapping[str, Any]]) -> None:
    """Put quantisation into a model, in place.

    Parameters
    ----------
    proto
        An ONNX model whose initialisers have the names of the parameters.
    grids
        By module, its grids: ``weight`` and ``input``, and ``output`` where there is one.

    Raises
    ------
    ExportError
        A layer's weight is not in the graph under its name.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    stored = {item.name: item for item in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made: dict[tuple[str, float, int], str] = {}
    before: dict[int, list[Any]] = {}
    after: dict[int, list[Any]] = {}
    position = {id(node): index for index, node in enumerate(graph.node)}

    def constant(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def pair(tensor: str, grid: Any, key: str) -> tuple[list[Any], str]:
        scale = constant(f"{key}.scale", np.float32(grid.scale.item()).reshape(()))
        kind = np.int8 if grid.low < 0 else np.uint8
        zero = constant(f"{key}.zero_point", kind(int(grid.zero.item())).reshape(()))
        nodes = [
            helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{key}.quantized"], f"{key}.quantize"),
            helper.make_node("DequantizeLinear", [f"{key}.quantized", scale, zero], [f"{key}.rounded"], f"{key}.back"),
        ]
        return nodes, f"{key}.rounded"

    for module, kinds in grids.items():
        name = f"{module}.weight" if module else "weight"
        node, slot, transposed = _layer(name, stored, readers)
        grid = kinds["weight"]
        axis = grid.axis
        values = numpy_helper.to_array(stored[name if name in stored else node.input[slot]])
        if transposed and axis is not None:
            axis = values.ndim - 1 - axis
        integers = _integers(values, grid, axis)
        graph.initializer.remove(stored[node.input[slot]])
        shape = () if axis is None else (-1,)
        scale = constant(f"{name}.scale", grid.scale.numpy().astype(np.float32).reshape(shape))
        zero = constant(f"{name}.zero_point", np.zeros(grid.scale.numel(), np.int8).reshape(shape))
        constant(f"{name}.int8", integers)
        extra = {} if axis is None else {"axis": axis}
        read = helper.make_node(
            "DequantizeLinear", [f"{name}.int8", scale, zero], [f"{name}.rounded"], f"{name}.dequantize", **extra
        )
        before.setdefault(position[id(node)], []).append(read)
        node.input[slot] = f"{name}.rounded"
        source = node.input[0]
        found = (source, float(kinds["input"].scale.item()), int(kinds["input"].zero.item()))
        if found not in made:
            nodes, made[found] = pair(source, kinds["input"], f"{module}.input")
            before.setdefault(position[id(node)], []).extend(nodes)
        node.input[0] = made[found]
        if "output" in kinds:
            plain = node.output[0]
            users = list(readers.get(plain, []))
            nodes, rounded = pair(plain, kinds["output"], f"{module}.output")
            after.setdefault(position[id(node)], []).extend(nodes)
            for user in users:
                for index, read_name in enumerate(user.input):
                    if read_name == plain:
                        user.input[index] = rounded
    ordered = []
    for index, node in enumerate(graph.node):
        ordered += [*before.get(index, []), node, *after.get(index, [])]
    del graph.node[:]
    graph.node.extend(ordered)


def _layer(name: str, stored: Mapping[str, Any], readers: Mapping[str, list[Any]]) -> tuple[Any, int, bool]:
    """The node that reads a weight, at which of its inputs, and whether it reads it transposed."""
    for candidate in (name, f"{name}_t", f"{name}.T"):
        for node in readers.get(candidate, []):
            slot = LAYERS.get(node.op_type)
            if slot is not None and node.input[slot] == candidate and candidate in stored:
                plain = node.op_type == "MatMul" or _attribute(node, "transB") == 0
                return node, slot, node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)
    raise ExportError(
        f"{name} is not read by a convolution or matrix product of the ONNX graph under its own name, so that its "
        "scales cannot be put there; name its module in quantize.exclude"
    )


def _attribute(node: Any, name: str) -> int:
    return next((item.i for item in node.attribute if item.name == name), 0)


def _integers(values: np.ndarray, grid: Any, axis: int | None) -> np.ndarray:
    scale = grid.scale.numpy().astype(np.float64)
    if axis is not None:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    return np.clip(np.rint(values / scale), grid.low, grid.high).astype(np.int8)
