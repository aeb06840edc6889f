"""From dense to compact on real data: files, numbers, reasons."""

import json

import pytest
import torch

from nni_plugins.training import (
    CompressionError,
    RecipeError,
    build_data,
    build_model,
    compress,
    evaluate_test,
    load_recipe,
    prepare_dense,
    recipe_from_dict,
)
from nni_plugins.training.artefacts import COMPACT, MASKED, load_masks, load_model
from nni_plugins.training.loop import Loop
from nni_plugins.training.weights import load_weights


@pytest.fixture(scope="module")
def cnn():
    return recipe_from_dict(
        {
            "model": {"name": "resnet8", "arguments": {"width": 8}},
            "data": {"batch_size": 128},
            "train": {"epochs": 5, "warmup_epochs": 1, "threads": 1},
            "finetune": {"epochs": 2, "learning_rate": 0.02},
        }
    )


@pytest.fixture(scope="module")
def dense(cnn, tmp_path_factory):
    return prepare_dense(cnn, tmp_path_factory.mktemp("dense"), lambda line: None)


def test_the_whole_way(cnn, dense, tmp_path):
    seen = []
    metrics = compress(cnn, tmp_path, dense, seen.append)
    assert next(iter(metrics)) == "default"
    assert metrics["default"] == metrics["accuracy"] == seen[-1]
    assert len(seen) == 2
    assert metrics["accuracy"] > 0.85
    assert metrics["macs"] <= 0.5 * dense.macs * 1.02
    assert metrics["relative_error"] < 1e-5
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert load_recipe(tmp_path / "recipe.yml") == cnn
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {COMPACT, MASKED, "masks.safetensors", "metrics.json", "plan.json", "recipe.yml"}

    data = build_data(cnn)
    compact = load_model(cnn, data, tmp_path / COMPACT)
    assert sum(p.numel() for p in compact.parameters()) == metrics["params"] < dense.params
    masked = build_model(cnn, data.shape, data.classes, 0)
    load_weights(masked, tmp_path / MASKED)
    images = torch.rand(8, *data.shape)
    torch.testing.assert_close(compact.eval()(images), masked.eval()(images), rtol=1e-4, atol=1e-5)
    masks = load_masks(tmp_path / "masks.safetensors")
    modules = dict(masked.named_modules())
    for module, targets in masks.items():
        for name, mask in targets.items():
            assert not (getattr(modules[module], name) * (1 - mask)).any(), (module, name)
    plan = json.loads((tmp_path / "plan.json").read_text())["groups"]
    assert plan["conv1"]["size"] == 8
    assert len(plan["conv1"]["kept"]) == compact.conv1.out_channels
    assert Loop(cnn, data).evaluate(compact) == pytest.approx(metrics["accuracy"], abs=1 / 287)

    test = evaluate_test(cnn, tmp_path / COMPACT)
    assert test["accuracy"] > 0.8
    assert evaluate_test(cnn, dense.path)["accuracy"] > 0.8
    with pytest.raises(CompressionError, match="cannot be read as a model"):
        evaluate_test(cnn, tmp_path / "metrics.json")


def same_weights(recipe, *folders):
    data = build_data(recipe)
    one, two = (load_model(recipe, data, folder / COMPACT).state_dict() for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_same_seed_same_result(cnn, dense, tmp_path):
    one, two = (compress(cnn, tmp_path / name, dense) for name in "ab")
    same_weights(cnn, tmp_path / "a", tmp_path / "b")
    assert one["accuracy"] == two["accuracy"]


def test_finetuning_the_compact_model_does_the_same(cnn, dense, tmp_path):
    masked = compress(cnn, tmp_path / "a", dense)
    compact = compress(cnn.with_values({"steps": ["prune", "speedup", "finetune"]}), tmp_path / "b", dense)
    assert compact["macs"] == masked["macs"]
    assert compact["accuracy"] == pytest.approx(masked["accuracy"], abs=0.02)
    assert not (tmp_path / "b" / MASKED).exists()


class Interrupted(Exception):
    pass


def test_an_interrupted_finetuning_goes_on(cnn, dense, tmp_path):
    whole = compress(cnn, tmp_path / "whole", dense)

    def stop(value, seen=[]):  # noqa: B006
        seen.append(value)
        if len(seen) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(cnn, tmp_path / "cut", dense, stop)
    seen = []
    assert compress(cnn, tmp_path / "cut", dense, seen.append)["accuracy"] == whole["accuracy"]
    assert len(seen) == 1
    same_weights(cnn, tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "prune",
    [
        {"pruner": "random"},
        {"pruner": "taylor", "arguments": {"training_steps": 5}},
        {"pruner": "hybrid", "arguments": {"total_steps": 20, "density": 1.0}},
        {"groups": {"conv1": 0.2, "layer1": 0.5, "layer3": 0.5}},
        {"groups": {"layer2": 0.5}, "target": "channels", "sparsity": 0.25},
        {"scope": "local", "target": "params", "round_to": 2},
        {"pruner": "nni:L1NormPruner", "target": "channels"},
        {"pruner": "nni:TaylorPruner", "target": "channels", "arguments": {"training_steps": 3}},
    ],
)
def test_pruners(cnn, dense, tmp_path, prune):
    recipe = cnn.with_values({f"prune.{name}": value for name, value in prune.items()} | {"finetune.epochs": 0,
                             "speedup.recalibrate_batches": 5})  # fmt: skip
    metrics = compress(recipe, tmp_path, dense)
    assert metrics["macs"] < 0.9 * dense.macs
    ours = not recipe.prune.pruner.startswith("nni:")
    assert metrics["relative_error"] < 1e-5 or not ours
    if ours and recipe.prune.target != "channels":
        assert metrics[recipe.prune.target] <= 0.52 * getattr(dense, recipe.prune.target)
    assert not metrics["finetuned"]


def test_a_broken_bound_is_reported_without_finetuning(cnn, dense, tmp_path):
    seen = []
    recipe = cnn.with_values({"prune.sparsity": 0.2, "objective.macs": 0.5})
    metrics = compress(recipe, tmp_path, dense, seen.append)
    assert not metrics["feasible"]
    assert not metrics["finetuned"]
    assert metrics["default"] < 0 < metrics["accuracy"]
    assert metrics["broken_bounds"]["macs"] == pytest.approx(0.6, abs=0.05)
    assert not seen
    tried = compress(recipe.with_values({"objective.skip_infeasible": False}), tmp_path, dense, seen.append)
    assert tried["finetuned"]
    assert len(seen) == 2
    assert seen[-1] == pytest.approx(tried["default"])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"prune.sparsity": 0.95, "prune.max_sparsity": 0.5}, CompressionError, "prune (magnitude): "),
        ({"prune.sparsity": 0.9, "prune.groups.layer1": 0.1, "prune.groups.layer2": 0, "prune.groups.layer3": 0,
          "prune.groups.conv1": 0}, CompressionError, "prune.sparsity 0.9 of macs is out of reach"),
        ({"finetune.learning_rate": 1e30}, CompressionError, "fine-tuning diverged: the loss is "),
        ({"prune.pruner": "magnitud"}, RecipeError, "magnitud, which is no pruner; did you mean magnitude?"),
        ({"prune.pruner": "nni:L1Norm"}, RecipeError, "which NNI does not have; did you mean L1NormPruner?"),
        ({"prune.arguments.nrm": "l2"}, RecipeError, "prune.arguments.nrm is not an argument of magnitude; did"),
        ({"prune.pruner": "nni:TaylorPruner"}, RecipeError, "prune.arguments.training_steps is missing"),
        ({"prune.pruner": "hybrid", "prune.arguments.compact": 0.1}, RecipeError, "takes channels out by its speedup"),
        ({"prune.pruner": "hybrid"}, CompressionError, "how long training lasts is not known"),
        ({"prune.arguments.model": 1}, RecipeError, "prune.arguments.model is not an argument of magnitude"),
        ({"prune.arguments.dummy_input": 1}, RecipeError, "prune.arguments do not fit magnitude: TypeError"),
        ({"prune.pruner": "math:pi"}, RecipeError, "prune.pruner is math:pi, which is not a class but float"),
    ],
)  # fmt: skip
def test_trials_that_cannot_work_say_why(cnn, dense, tmp_path, values, error, message):
    with pytest.raises(error) as caught:
        compress(cnn.with_values(values), tmp_path, dense)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.json").exists()


REGRESSION = """
import torch
from torch import nn

def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 6, generator=generator)
    y = (x[:, :3] * x[:, 3:]).sum(1)
    batches = lambda a, b: [(x[i:i + 32], y[i:i + 32]) for i in range(a, b, 32)]
    return {"train": batches(0, 320), "validation": batches(320, 416), "test": lambda: batches(416, 512)}

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.body(x)).squeeze(1)

def build(width=32):
    return Net(width)

def huber(output, target):
    return nn.functional.huber_loss(output, target)
"""


def test_regression(tmp_path):
    (tmp_path / "own_task.py").write_text(REGRESSION)
    recipe = recipe_from_dict(
        {
            "model": {"name": "own_task:build", "arguments": {"width": 24}},
            "data": {"name": "own_task:loaders"},
            "train": {
                "epochs": 40,
                "optimizer": "adamw",
                "learning_rate": 0.01,
                "loss": "own_task:huber",
                "metric": "mse",
            },
            "finetune": {"epochs": 20, "learning_rate": 0.005},
            "objective": {"macs": 0.55},
        },
        folder=tmp_path,
    )
    dense = prepare_dense(recipe, tmp_path / "dense", lambda line: None)
    metrics = compress(recipe, tmp_path / "out", dense)
    assert dense.accuracy < 0.01
    assert metrics["metric"] == "mse"
    assert metrics["default"] == -metrics["accuracy"]
    assert metrics["accuracy"] < 0.02
    assert metrics["macs"] < 0.53 * dense.macs
    assert evaluate_test(recipe, tmp_path / "out" / COMPACT)["accuracy"] < 0.02


def test_a_checkpoint_of_another_recipe_is_not_taken(cnn, dense, tmp_path):
    def stop(value):
        raise Interrupted

    with pytest.raises(Interrupted):
        compress(
            cnn.with_values({"finetune.epochs": 3}), tmp_path, dense, lambda value: None if value < 0 else stop(value)
        )
    (tmp_path / "finetune-other.pt").write_bytes(b"x")
    compress(cnn.with_values({"prune.sparsity": 0.3, "finetune.epochs": 1}), tmp_path, dense)
    assert not list(tmp_path.glob("finetune*"))


def test_a_metric_that_is_no_number_never_reaches_the_tuner(cnn, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "evaluate", lambda *_: float("nan"))
    with pytest.raises(CompressionError, match="dense model: accuracy is nan on the validation split"):
        prepare_dense(cnn.with_values({"train.epochs": 0}), tmp_path / "dense")
    with pytest.raises(CompressionError, match="compact model: accuracy is nan on the validation split"):
        compress(cnn.with_values({"finetune.epochs": 0}), tmp_path, dense)
    assert not (tmp_path / "metrics.json").exists()
