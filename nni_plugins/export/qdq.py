"""Scales into an ONNX graph: QuantizeLinear and DequantizeLinear where an integer kernel looks for them.

Placement follows what onnxruntime and TensorRT document for explicit quantisation: a pair on each activation that a
convolution or matrix product reads, weights stored as int8 before one DequantizeLinear, by output channel; a pair on
what a residual addition reads. Biases stay in float. What stands between the layers has short names, and equal
constants are stored once: of a small model, the names are a tenth of the file.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import numpy as np

from nni_plugins.export.errors import ExportError

LAYERS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""Operators that hold a weight, and which of their inputs it is."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules of an operator."""


def insert(proto: Any, grids: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Any]) -> None:
    """Put quantisation into a model, in place.

    Parameters
    ----------
    proto
        An ONNX model.
    grids
        By module, its grids: ``weight`` and ``input``, and ``output`` where there is one.
    layers
        By module, the layer with its ``weight`` and ``bias``: exporters transpose and rename what they store.

    Raises
    ------
    ExportError
        No operator of the graph reads a layer's weight.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    stored = {item.name: item for item in graph.initializer}
    made: dict[Any, str] = {}
    first: list[Any] = []  # reads of weights
    after: dict[int, list[Any]] = {}
    position = {name: index for index, node in enumerate(graph.node) for name in node.output}
    found = _found(proto, grids, layers)

    fresh = _fresh_names(graph)

    def constant(values: np.ndarray) -> str:
        same = ("constant", str(values.dtype), values.shape, values.tobytes())
        if same not in made:
            made[same] = fresh("c")
            graph.initializer.append(numpy_helper.from_array(values, made[same]))
        return made[same]

    def pair(tensor: str, grid: Any, key: str, rounded: str) -> list[Any]:
        scale = constant(np.float32(grid.scale.item()).reshape(()))
        kind = np.int8 if grid.low < 0 else np.uint8
        zero = constant(kind(int(grid.zero.item())).reshape(()))
        quantized = fresh("q")
        return [
            helper.make_node("QuantizeLinear", [tensor, scale, zero], [quantized], key),
            helper.make_node("DequantizeLinear", [quantized, scale, zero], [rounded]),
        ]

    def weight(name: str, item: str, transposed: bool, grid: Any) -> str:
        same = (item, transposed, grid.low, grid.high, grid.scale.numpy().tobytes())
        if same not in made:
            values = numpy_helper.to_array(stored[item])
            axis = values.ndim - 1 - grid.axis if transposed and grid.axis is not None else grid.axis
            shape = () if axis is None else (-1,)
            integers = numpy_helper.from_array(_integers(values, grid, axis), f"{name}.int8")
            graph.initializer.append(integers)
            inputs = [
                integers.name,
                constant(grid.scale.numpy().astype(np.float32).reshape(shape)),
                constant(np.zeros(grid.scale.numel(), np.int8).reshape(shape)),
            ]
            extra = {} if axis is None else {"axis": axis}
            made[same] = fresh("w")
            first.append(helper.make_node("DequantizeLinear", inputs, [made[same]], **extra))
        return made[same]

    for module, nodes in found.items():  # before inputs, which read what is rounded here
        for index, (node, _) in enumerate(nodes if "output" in grids[module] else []):
            key = _key(module, "output", index)
            last = _with_bias(graph, node, layers[module], stored)
            plain = last.output[0]
            last.output[0] = fresh("f")  # whoever reads it, the graph's output too, reads what is rounded
            after.setdefault(position[plain], []).extend(pair(last.output[0], grids[module]["output"], key, plain))
    for module, nodes in found.items():
        for index, (node, transposed) in enumerate(nodes):
            slot, grid = LAYERS[node.op_type], grids[module]["input"]
            node.input[slot] = weight(
                _key(module, "weight", index), node.input[slot], transposed, grids[module]["weight"]
            )
            source = node.input[0]
            same = (source, float(grid.scale.item()), int(grid.zero.item()), grid.low, grid.high)
            if same not in made:
                made[same] = fresh("r")
                pairs = pair(source, grid, _key(module, "input", index), made[same])
                after.setdefault(position.get(source, -1), []).extend(pairs)
            node.input[0] = made[same]
    ordered = [*first, *after.get(-1, [])]
    for index, node in enumerate(graph.node):
        ordered += [node, *after.get(index, [])]
    read = {name for node in ordered for name in node.input} | {item.name for item in graph.output}
    for name, item in stored.items():
        if name not in read:
            graph.initializer.remove(item)
    del graph.node[:]
    graph.node.extend(ordered)


def _fresh_names(graph: Any) -> Callable[[str], str]:
    """Return a function that makes short names, which nothing in the graph has."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {item.name for item in (*graph.initializer, *graph.input, *graph.output)}
    numbers = count(1)

    def fresh(letter: str) -> str:
        return next(name for name in (f"_{letter}{number}" for number in numbers) if name not in taken)

    return fresh


def _key(module: str, what: str, index: int) -> str:
    return (f"{module}." if module else "") + what + (f".{index}" if index else "")


def _found(
    proto: Any, grids: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Any]
) -> dict[str, list[tuple[Any, bool]]]:
    """The operators that compute each module, one for each call, and whether they hold its weight transposed."""
    from onnx import numpy_helper

    stored = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in LAYERS and node.input[LAYERS[node.op_type]] in stored]
    found: dict[str, list[tuple[Any, bool]]] = {}
    claimed: set[int] = set()
    for module in grids:
        name, values = _key(module, "weight", 0), layers[module].weight.detach().cpu().numpy()
        fitting = []
        for node in nodes:
            transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and _attribute(node, "transB") == 0)
            held = stored[node.input[LAYERS[node.op_type]]]
            if np.array_equal(held.T if transposed else held, values):
                fitting.append((node, transposed))
        within = [item for item in fitting if module in _scopes(item[0])]
        named = [item for item in fitting if item[0].input[LAYERS[item[0].op_type]] == name]
        found[module] = within or named or [item for item in fitting if id(item[0]) not in claimed]
        claimed.update(id(node) for node, _ in found[module])
        if not found[module]:
            raise ExportError(
                f"{name} is not read by a convolution or matrix product of the ONNX graph, so that its scales cannot "
                "be put there; name its module in quantize.exclude"
            )
    return found


def _scopes(node: Any) -> list[str]:
    """The modules that an operator stands in, as far as the exporter noted them."""
    noted = next((item.value for item in node.metadata_props if item.key == SCOPES), "[]")
    try:
        return list(ast.literal_eval(noted))[:-1]  # the last is the operator's own
    except (ValueError, SyntaxError):
        return []


def _with_bias(graph: Any, node: Any, layer: Any, stored: Mapping[str, Any]) -> Any:
    """The operator that returns what the layer does: the addition of its bias, where that stands apart."""
    from onnx import numpy_helper

    if node.op_type != "MatMul" or layer.bias is None:
        return node
    bias = layer.bias.detach().cpu().numpy()
    for user in graph.node:
        if user.op_type == "Add" and node.output[0] in user.input:
            others = [name for name in user.input if name in stored]
            if others and np.array_equal(numpy_helper.to_array(stored[others[0]]), bias):
                return user
    return node


def _attribute(node: Any, name: str) -> int:
    return next((item.i for item in node.attribute if item.name == name), 0)


def _integers(values: np.ndarray, grid: Any, axis: int | None) -> np.ndarray:
    scale = grid.scale.numpy().astype(np.float64)
    if axis is not None:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    return np.clip(np.rint(values / scale), grid.low, grid.high).astype(np.int8)
