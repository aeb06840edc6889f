"""Scales find the layers that they belong to, whatever an exporter makes of their names and layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import export_onnx
from nni_plugins.training.data import build_data
from nni_plugins.training.loop import Loop
from nni_plugins.training.quantize import quantize
from nni_plugins.training.recipe import recipe_from_dict


class Attention(nn.Module):
    """Matrix products with transposed, renamed weights and biases apart; one input is read out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.k, self.q = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.embed, self.out, self.norm, self.head = (
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        y = self.norm(x)
        weights = (self.q(y) @ self.k(y).transpose(1, 2) / 4).softmax(-1)
        x = x + self.out(weights @ self.v(y))
        return self.head(x.mean(1))


class Chain(nn.Module):
    """A layer that is called twice, one that shares its weight, one whose weight is read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(64, 10)
        self.c.weight = self.b.weight

    def forward(self, x):
        x = self.a(x.flatten(1)).relu()
        x = self.c(self.b(self.b(x).relu()).relu())
        return self.head(x @ self.a.weight)


class Returned(nn.Module):
    """What an addition reads is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        part = self.a(x.flatten(1))
        return part + self.b(x.flatten(1)), part


def _quantised(model):
    tree = {"data": {"limit": 300}, "train": {"threads": 1}, "quantize": {"method": "ptq", "calibrate_batches": 3}}
    recipe = recipe_from_dict(tree)
    loop = Loop(recipe, build_data(recipe), "test")
    if isinstance(model, Returned):
        loop.evaluate = lambda model: 0.0
    return quantize(recipe, model.eval(), loop), loop.data.example


@pytest.mark.parametrize("kind", [Attention, Chain, Returned])
def test_the_file_computes_what_the_model_that_rounds_does(kind, tmp_path):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    made, example = _quantised(kind())
    path = tmp_path / "int8.onnx"
    assert export_onnx(made.plain(), example, path, grids=made.grids, reference=made.model).dynamic_batch
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    images = torch.rand(200, 1, 8, 8)
    with torch.no_grad():
        wanted = made.model(images)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for found, other in zip(session.run(None, {session.get_inputs()[0].name: images.numpy()}), wanted, strict=True):
        error = np.abs(found - other.numpy()).mean() / np.abs(other.numpy()).mean()
        assert error < 5e-3  # a value on the border between two integers may fall to either side
    stored = onnx.load(path).graph.initializer
    assert all(item.data_type == onnx.TensorProto.INT8 for item in stored if item.name.endswith(".int8"))
    if kind is Chain:  # stored once
        assert len([item.name for item in stored if item.name in ("b.weight.int8", "c.weight.int8")]) == 1


def test_a_weight_that_no_operator_reads_is_said(tmp_path):
    made, example = _quantised(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    other = made.plain()
    other[1] = nn.Sequential(other[1], nn.Identity())
    made.grids["1.0"] = made.grids.pop("1")
    export_onnx(other, example, tmp_path / "fine.onnx", grids=made.grids)
    other[1].add_module("idle", nn.Linear(3, 3))
    other[1].forward = other[1][0].forward
    with pytest.raises(ExportError, match=r"1\.idle\.weight is not read by a convolution"):
        export_onnx(other, example, tmp_path / "bad.onnx", grids={"1.idle": made.grids["1.0"]})


class Named(nn.Module):
    """Layers whose names are those that the file's own tensors would like to have."""

    def __init__(self):
        super().__init__()
        self._c1, self._q1, self._r1 = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self._w1 = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self._r1(torch.relu(self._q1(self._c1(x.flatten(1)) * self._w1)))


def test_little_is_stored_but_the_weights(tmp_path):
    import onnx
    import onnxruntime
    from onnx import defs, helper, numpy_helper

    torch.manual_seed(0)
    made, example = _quantised(Named())
    path = tmp_path / "int8.onnx"
    export_onnx(made.plain(), example, path, grids=made.grids, reference=made.model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    images = torch.rand(50, 1, 8, 8)
    (found,) = onnxruntime.InferenceSession(str(path), options).run(None, {"x": images.numpy()})
    with torch.no_grad():
        assert np.abs(found - made.model(images).numpy()).max() < 1e-5  # no name was taken twice
    proto = onnx.load(path)
    names = [name for node in proto.graph.node for name in node.output]
    names += [item.name for item in (*proto.graph.initializer, *proto.graph.input)]
    assert len(names) == len(set(names))
    held = [numpy_helper.to_array(item) for item in proto.graph.initializer if not item.name.endswith(".int8")]
    assert len({(item.dtype, item.shape, item.tobytes()) for item in held}) == len(held)  # equal ones once
    weights = sum(layer.weight.numel() for layer in (made.model._c1, made.model._q1, made.model._r1))
    floats = sum(item.nbytes for item in held)
    nodes = len(proto.graph.node)
    assert path.stat().st_size < weights + floats + 16 * len(held) + 80 * nodes + 200, (path.stat().st_size, weights)
    for node in proto.graph.node:
        known = defs.get_schema(node.op_type, proto.opset_import[0].version).attributes
        for one in node.attribute:
            usual = known[one.name].default_value
            assert not usual.type or helper.get_attribute_value(usual) != helper.get_attribute_value(one), node
