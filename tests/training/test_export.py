"""A recipe from dense to an 8-bit ONNX file: every file loads in a fresh process and agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import export_onnx, read_metadata
from nni_plugins.export.tensorrt import check_tensorrt, two_of_four
from nni_plugins.training.artefacts import evaluate_test, load_model
from nni_plugins.training.data import build_data
from nni_plugins.training.dense import prepare_dense
from nni_plugins.training.pipeline import compress
from nni_plugins.training.recipe import recipe_from_dict

TREE = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"limit": 900},
    "train": {"epochs": 6, "threads": 1},
    "prune": {"sparsity": 0.5},
    "finetune": {"epochs": 3},
    "quantize": {"method": "qat", "epochs": 2, "activations": "symmetric"},
    "export": {"formats": ["onnx", "pt2", "tensorrt"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    recipe = recipe_from_dict(TREE)
    dense = prepare_dense(recipe, tmp_path_factory.mktemp("dense"), lambda line: None)
    folder = tmp_path_factory.mktemp("out")
    return recipe, dense, folder, compress(recipe, folder, dense)


def test_metrics_are_those_of_what_is_shipped(made):
    recipe, dense, folder, metrics = made
    assert metrics["final"] == "int8.onnx"
    assert metrics["bytes"] == (folder / "int8.onnx").stat().st_size
    assert metrics["float_bytes"] == (folder / "compact.safetensors").stat().st_size
    assert metrics["bytes"] < dense.bytes / 3  # of a small net the graph is a good part
    assert set(metrics["exports"]) == {"onnx", "int8", "pt2", "tensorrt"}
    assert metrics["exports"]["onnx"]["relative_error"] < 1e-4
    assert metrics["exports"]["pt2"]["relative_error"] < 1e-5
    assert metrics["exports"]["onnx"]["dynamic_batch"] is True
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    tested = evaluate_test(recipe, folder / "int8.onnx")["accuracy"]
    assert abs(tested - evaluate_test(recipe, folder / "compact.safetensors")["accuracy"]) < 0.05


def test_a_file_says_where_it_comes_from(made):
    recipe, _, folder, metrics = made
    for name in ("compact.onnx", "int8.onnx"):
        said = read_metadata(folder / name)
        assert said["recipe"] == json.loads(json.dumps(recipe.to_dict()))
        assert said["metrics"]["accuracy"] == metrics["accuracy"]
        assert said["plan"] == json.loads((folder / "plan.json").read_text())["groups"]


def test_every_file_agrees_in_a_fresh_process(made):
    recipe, _, folder, _ = made
    data = build_data(recipe)
    images = next(iter(data.validation))[0][:4]
    with torch.no_grad():
        wanted = load_model(recipe, data, folder / "compact.safetensors").eval()(images)
    torch.save(images, folder / "images.pt")
    code = (
        "import json, sys, onnxruntime, torch\n"
        "folder = sys.argv[1]\n"
        "images = torch.load(folder + '/images.pt', weights_only=True)\n"
        "found = {'pt2': torch.export.load(folder + '/compact.pt2').module()(images).tolist()}\n"
        "for name in ('compact', 'int8'):\n"
        "    session = onnxruntime.InferenceSession(f'{folder}/{name}.onnx')\n"
        "    found[name] = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0].tolist()\n"
        "print(json.dumps(found))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    found = {name: torch.tensor(values) for name, values in json.loads(answer.stdout.splitlines()[-1]).items()}
    torch.testing.assert_close(found["pt2"], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["compact"], wanted, rtol=1e-4, atol=1e-4)
    assert (found["int8"].argmax(1) == wanted.argmax(1)).float().mean() >= 0.75


def test_what_tensorrt_takes(made, tmp_path):
    metrics = made[3]
    command = metrics["exports"]["tensorrt"]["command"]
    assert command.startswith("trtexec --onnx=int8.onnx --saveEngine=int8.engine --int8")
    assert "--optShapes=images:8x1x8x8" in command
    assert metrics["exports"]["tensorrt"]["run"] is False

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.bitwise_xor(x, x + 1)

    export_onnx(Odd(), torch.arange(6).reshape(2, 3), tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"odd\.onnx: TensorRT has no BitwiseXor"):
        check_tensorrt(tmp_path / "odd.onnx")


def test_unsigned_activations_are_refused_for_tensorrt(made, tmp_path):
    recipe, dense, _, _ = made
    wrong = recipe.with_values({"quantize.activations": "affine", "quantize.method": "ptq", "finetune.epochs": 0})
    with pytest.raises(Exception, match=r"set quantize\.activations: symmetric"):
        compress(wrong, tmp_path, dense)


def test_files_of_a_run_before_do_not_stay(made, tmp_path):
    recipe, dense, _, _ = made
    for name in ("int8.onnx", "compact.pt2", "grids.json", "ranking.json"):
        (tmp_path / name).write_text("of another run")
    plain = {"quantize.method": "none", "export.formats": ["onnx"], "finetune.epochs": 0}
    metrics = compress(recipe.with_values(plain), tmp_path, dense)
    assert metrics["final"] == "compact.safetensors"
    assert {path.suffix for path in tmp_path.iterdir() if path.suffix in (".onnx", ".pt2")} == {".onnx"}
    assert not any((tmp_path / name).exists() for name in ("int8.onnx", "grids.json", "ranking.json"))


def test_two_of_four():
    weight = torch.ones(4, 8)
    assert not two_of_four(weight.numpy())
    weight.view(-1, 4)[:, 1:3] = 0
    assert two_of_four(weight.numpy())
    assert not two_of_four(torch.zeros(4, 8).numpy())
    assert not two_of_four(torch.ones(4, 6).numpy())


def test_two_of_four_stay_through_eight_bits(tmp_path):
    import onnx
    from onnx import numpy_helper

    from nni_plugins.training import load_recipe
    from nni_plugins.training.artefacts import load_masks

    whole = load_recipe(Path(__file__).parents[2] / "experiments" / "digits_2to4" / "recipe.yml")
    short = {"train.epochs": 1, "finetune.epochs": 1, "quantize.epochs": 1, "data.limit": 300, "train.threads": 1}
    recipe = whole.with_values({**short, "model.name": "resnet8"})
    dense = prepare_dense(recipe, tmp_path / "dense", lambda line: None)
    metrics = compress(recipe, tmp_path, dense)
    masks = load_masks(tmp_path / "masks.safetensors")
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    said = metrics["exports"]["tensorrt"]
    assert said["sparse_2_4"] == sorted(f"{name}.weight.int8" for name in masks)
    assert len(masks) >= 9
    assert "--sparsity=enable" in said["command"]
    for name, targets in masks.items():
        gone = targets["weight"].numpy() == 0
        assert gone.mean() == 0.5
        assert not stored[f"{name}.weight.int8"][gone].any()
