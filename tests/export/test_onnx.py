"""ONNX files compute what the model computes, in float and on trained grids."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from nni_plugins.export.agreement import largest_error, with_batch
from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import export_onnx, read_metadata, run_onnx
from nni_plugins.training.data import build_data
from nni_plugins.training.loaders import split_batch
from nni_plugins.training.loop import Loop
from nni_plugins.training.models import build_model
from nni_plugins.training.quantize import quantize
from nni_plugins.training.recipe import recipe_from_dict


class Two(nn.Module):
    """Two inputs, two outputs, a dictionary among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left, right):
        both = self.a(left) + self.b(right)
        return {"sum": both, "parts": (self.a(left), both.relu())}


class Fixed(nn.Module):
    """Holds the size of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(x.reshape(1, 8) if x.shape[0] == 1 else x.reshape(2, 4).repeat(1, 2))


def test_a_file_with_a_free_batch(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model.train()
    x = torch.rand(1, 1, 8, 8)
    made = export_onnx(model, x, tmp_path / "deep" / "model.onnx", metadata={"accuracy": 0.5})
    assert model.training
    assert made.dynamic_batch
    assert made.note == ""
    assert made.relative_error < 1e-5
    assert read_metadata(made.path) == {"accuracy": 0.5}
    for size in (1, 3, 7):
        images = torch.rand(size, 1, 8, 8)
        np.testing.assert_allclose(run_onnx(made.path, images)[0], model.eval()(images).detach(), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left"), ()])
def test_several_inputs_and_outputs(tmp_path, names):
    both = {"left": torch.randn(1, 4), "right": torch.randn(1, 5)}
    given = {name: both[name] for name in names} if names else tuple(both.values())
    made = export_onnx(Two(), given, tmp_path / "two.onnx")
    assert sorted(made.inputs) == ["left", "right"]
    assert len(made.outputs) == 3
    assert made.relative_error < 1e-5


def test_a_batch_that_is_not_free_is_said(tmp_path):
    made = export_onnx(Fixed(), torch.randn(1, 8), tmp_path / "fixed.onnx")
    assert not made.dynamic_batch
    assert made.note.startswith("the batch size is fixed: ")
    assert made.relative_error < 1e-5


def test_what_cannot_be_exported_leaves_no_file(tmp_path):
    class Bad(nn.Module):
        def forward(self, x):
            raise RuntimeError("no way")

    with pytest.raises(ExportError, match=r"bad\.onnx cannot be exported") as error:
        export_onnx(Bad(), torch.randn(1, 2), tmp_path / "bad.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(ExportError, match="computes something else"):
        export_onnx(model, torch.randn(1, 3), tmp_path / "model.onnx", reference=other)


@pytest.fixture(scope="module")
def quantised():
    tree = {
        "model": {"name": "resnet8", "arguments": {"width": 8}},
        "data": {"limit": 900},
        "train": {"epochs": 6, "threads": 1},
        "quantize": {"method": "ptq", "calibrate_batches": 5},
    }
    recipe = recipe_from_dict(tree)
    data = build_data(recipe)
    loop = Loop(recipe, data, "test")
    model = build_model(recipe, data.shape, data.classes, 0)
    loop.train(model, loop.optimizer(model))
    return recipe, model.eval(), loop


def _accuracy(path, loop):
    hits = count = 0
    for batch in loop.data.validation:
        images, labels = split_batch(batch)
        hits += int((run_onnx(path, images)[0].argmax(1) == labels.numpy()).sum())
        count += len(labels)
    return hits / count


@pytest.mark.parametrize("activations", ["affine", "symmetric"])
@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_int8_agrees_with_the_model_that_rounds(quantised, tmp_path, method, activations):
    import onnx
    import onnxruntime

    recipe, model, loop = quantised
    changes = {"quantize.method": method, "quantize.epochs": 1, "quantize.activations": activations}
    made = quantize(recipe.with_values(changes), model, loop)
    path = tmp_path / "int8.onnx"
    export_onnx(made.plain(), loop.data.example, path, grids=made.grids, reference=made.model)
    float_file = export_onnx(model, loop.data.example, tmp_path / "float.onnx")
    assert path.stat().st_size < 0.5 * float_file.bytes
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    images = split_batch(next(iter(loop.data.validation)))[0]
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        wanted = made.model(images).numpy()
    off = np.abs(found - wanted) > 1e-3 * np.abs(wanted).max()
    assert off.mean() < 0.02  # a value on the border between two integers may fall to either side
    assert abs(_accuracy(path, loop) - loop.evaluate(made.model)) <= 0.006
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") >= 10
    stored = {item.name: item.data_type for item in onnx.load(path).graph.initializer}
    assert all(stored[f"{name}.weight.int8"] == onnx.TensorProto.INT8 for name in made.grids)


def test_linear_and_transposed_layers_are_quantised_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 256, 10),
    )  # fmt: skip
    recipe = recipe_from_dict({"data": {"limit": 300}, "quantize": {"method": "ptq"}, "train": {"threads": 1}})
    loop = Loop(recipe, build_data(recipe), "test")
    made = quantize(recipe, model, loop)
    assert made.grids["2"]["weight"].axis is None
    result = export_onnx(made.plain(), loop.data.example, tmp_path / "m.onnx", grids=made.grids, reference=made.model)
    assert result.relative_error < 0.1


def test_a_fresh_process_reads_it_without_nni(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    export_onnx(model, x, tmp_path / "m.onnx", metadata={"macs": 48})
    code = (
        "import json, sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "x = numpy.array(json.loads(sys.argv[2]), dtype='float32')\n"
        "print(json.dumps(session.run(None, {session.get_inputs()[0].name: x})[0].tolist()))\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "m.onnx"), json.dumps(x.tolist())]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    np.testing.assert_allclose(json.loads(answer.stdout), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_more_rows_are_the_first_ones_repeated():
    x = torch.arange(6).reshape(3, 2)
    assert with_batch({"x": x}, 5)["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert torch.equal(copy.deepcopy(with_batch(x, 2)), x[:2])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0])
def test_what_is_no_number_is_no_agreement(wrong):
    model, x = nn.Linear(3, 2), torch.randn(1, 3)

    def run(inputs):
        out = model(inputs).detach().clone()
        out[0, 1] = wrong if wrong != 1.0 else out[0, 1] + 1.0
        return [out]

    worst, relative = largest_error(model, run, x, True, "file")
    assert worst == pytest.approx(1.0) if wrong == 1.0 else worst == float("inf")
    assert relative > 0.1
    assert largest_error(model, lambda inputs: [model(inputs)], x, True, "file") == (0.0, 0.0)


def test_infinities_of_both_agree():
    class Masked(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, -torch.inf)

    model = Masked()
    assert largest_error(model, lambda inputs: [model(inputs)], torch.randn(2, 3), False, "file") == (0.0, 0.0)


def test_half_precision_is_held_to_what_it_can(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).half()
    made = export_onnx(model, torch.randn(1, 3, 8, 8).half(), tmp_path / "half.onnx")
    assert 0 < made.relative_error < 8e-3
    with pytest.raises(ExportError, match="computes something else"):
        export_onnx(
            nn.Linear(4, 3).half(), torch.randn(1, 4).half(), tmp_path / "m.onnx", reference=nn.Linear(4, 3).half()
        )


def test_a_type_that_the_runtime_lacks_is_said(tmp_path):
    with pytest.raises(ExportError, match=r"^b\.onnx cannot be opened in onnxruntime: .*; export model\.float\(\)$"):
        export_onnx(nn.Linear(4, 3).bfloat16(), torch.randn(2, 4).bfloat16(), tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())
