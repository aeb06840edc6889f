"""Timing and exporting what a compression left, from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from nni_plugins.cli import commands
from nni_plugins.report.bench import bench
from nni_plugins.training.dense import prepare_dense
from nni_plugins.training.pipeline import compress
from nni_plugins.training.recipe import recipe_from_dict

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def _net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 256, 4),
    )  # fmt: skip


@pytest.mark.alone
def test_a_smaller_model_is_faster_in_every_runtime():
    models = {"dense": _net(64), "compact": _net(8)}
    timings = bench(models, torch.randn(1, 1, 16, 16), runtimes=("eager", "onnx"), batches=(1, 4), seconds=0.3)
    assert [(one.model, one.runtime, one.batch) for one in timings] == [
        (name, runtime, batch) for batch in (1, 4) for name in ("dense", "compact") for runtime in ("eager", "onnx")
    ]
    for one in timings:
        assert 0 < one.median_ms <= one.p95_ms
        assert one.ratio == 1.0 if one.model == "dense" else one.ratio < 0.7
        assert (one.bytes is not None) == (one.runtime == "onnx")


def test_what_cannot_run_has_a_note_and_the_others_figures():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 256)

    timings = bench(
        {"dense": _net(8), "odd": Fixed()}, torch.randn(1, 1, 16, 16), runtimes=("eager",), batches=(1, 2), seconds=0.05
    )
    odd = [one for one in timings if one.model == "odd"]
    assert odd[0].median_ms is not None
    assert odd[1].median_ms is None
    assert "batch 2" in odd[1].note
    assert all(one.median_ms is not None for one in timings if one.model == "dense")


def test_memory_is_that_of_a_process_of_its_own():
    wide = nn.Sequential(nn.Linear(2000, 6000), nn.ReLU(), nn.Linear(6000, 10))  # 46 MiB of weights
    timings = bench(
        {"dense": wide, "compact": nn.Linear(2000, 10)}, torch.randn(1, 2000), runtimes=("eager", "onnx"), batches=(1,),
        seconds=0.05, memory=True,
    )  # fmt: skip
    peaks = {(one.model, one.runtime): one.peak_mib for one in timings}
    for runtime in ("eager", "onnx"):
        assert 40 < peaks["dense", runtime] < 400
        assert peaks["compact", runtime] < 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recipe = recipe_from_dict(
        {
            "model": {"name": "small_cnn"},
            "data": {"limit": 300},
            "train": {"epochs": 1, "threads": 1},
            "finetune": {"epochs": 0},
            "quantize": {"method": "ptq", "calibrate_batches": 2},
            "export": {"formats": ["onnx"]},
        }
    )
    home = tmp_path_factory.mktemp("run")
    compress(recipe, home / "best", prepare_dense(recipe, home / "dense", lambda line: None))
    return home


def _call(*arguments):
    result = CliRunner().invoke(commands, list(map(str, arguments)))
    return result.exit_code, result.output


def test_bench_of_a_finished_folder(folder):
    code, text = _call(
        "bench", folder, "--runtimes", "eager,onnx,int8", "--seconds", "0.05", "--batches", "1,2", "--json"
    )
    assert code == 0, text
    found = json.loads(text[text.index("[\n") :])
    assert {(one["model"], one["runtime"]) for one in found} == {
        ("dense", "eager"),
        ("dense", "onnx"),
        ("compact", "eager"),
        ("compact", "onnx"),
        ("compact", "int8"),
    }
    assert all(one["median_ms"] > 0 for one in found)
    code, text = _call("bench", folder, "--runtimes", "int8", "--seconds", "0.02", "--batches", "1")
    assert code == 0
    assert "of dense" in text


def test_export_of_a_finished_folder(folder, tmp_path):
    code, text = _call("export", folder, "--format", "onnx", "--format", "tensorrt", "--output", tmp_path)
    assert code == 0, text
    assert (tmp_path / "compact.onnx").is_file()
    assert "any batch size" in text
    assert "not run: there is no GPU here" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "nowhere:net"], "say what the model takes"),
        (["bench", "."], "no compression is here"),
        (["bench", "FOLDER", "--batches", "0"], "--batches 0"),
        (["bench", "FOLDER", "--batches", "a"], "--batches a"),
        (["bench", "FOLDER", "--runtimes", "fast"], "--runtimes: fast is none of"),
        (["export", "."], "no compression is here"),
        (["export", "FOLDER", "--format", "caffe"], "caffe"),
    ],
)
def test_wrong_arguments_are_one_line(folder, arguments, says):
    code, text = _call(*[folder if item == "FOLDER" else item for item in arguments])
    assert code != 0
    assert says in text
    assert "Traceback" not in text
