"""Quantisation under the zeros that pruning left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_plugins.training.data import build_data
from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.loop import Loop
from nni_plugins.training.models import build_model
from nni_plugins.training.quantize import quantize
from nni_plugins.training.recipe import recipe_from_dict

TREE = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"limit": 900},
    "train": {"epochs": 6, "threads": 1},
    "quantize": {"method": "ptq", "epochs": 2, "calibrate_batches": 5},
}


@pytest.fixture(scope="module")
def trained():
    recipe = recipe_from_dict(TREE)
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0)
    loop = Loop(recipe, data, "test")
    loop.train(model, loop.optimizer(model))
    with torch.no_grad():
        torch.manual_seed(0)
        weight = model.layer2[0].conv1.weight
        weight[torch.rand_like(weight) < 0.3] = 0  # unstructured
        fine = model.layer3[0].conv1.weight  # 2:4
        fine.view(-1, 4)[:, :2] = 0
    return recipe, model.eval(), loop


def _run(trained, **changes):
    recipe, model, loop = trained
    return quantize(recipe.with_values({f"quantize.{name}": value for name, value in changes.items()}), model, loop)


def test_looking_at_batches_changes_no_weight_but_by_rounding(trained):
    _, model, loop = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = _run(trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(made.folded) == 9
    assert not any(type(module).__name__ == "BatchNorm2d" for module in made.model.modules())
    assert loop.evaluate(made.model) >= loop.evaluate(model) - 0.02
    for name, grids in made.grids.items():
        weight, grid = made.model.get_submodule(name).weight, grids["weight"]
        steps = weight.detach() / grid.scale.reshape(-1, *[1] * (weight.dim() - 1))
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert steps.round().abs().max() <= 127
        assert grids["input"].scale.numel() == 1


@pytest.mark.parametrize("method", ["ptq", "qat", "lsq"])
def test_zeros_stay_zeros_element_for_element(trained, method):
    _, model, _ = trained
    made = _run(trained, method=method)
    for name in ("layer2.0.conv1", "layer3.0.conv1"):
        zero = model.get_submodule(name).weight == 0
        assert zero.any()
        assert (made.model.get_submodule(name).weight[zero] == 0).all()
        assert made.zeros[f"{name}.weight"] == int(zero.sum())


def test_training_under_the_grids_changes_the_weights(trained):
    made, looked = _run(trained, method="qat"), _run(trained)
    assert not torch.equal(made.model.conv1.weight, looked.model.conv1.weight)


def test_what_an_addition_reads_is_rounded_too(trained):
    made = _run(trained)
    with_output = {name for name, grids in made.grids.items() if "output" in grids}
    assert with_output >= {"layer1.0.conv2", "layer2.0.conv2", "layer2.0.downsample.0"}
    assert not with_output & {"conv1", "layer1.0.conv1", "fc"}


def test_ends_of_the_integers(trained):
    affine, symmetric = _run(trained), _run(trained, activations="symmetric")
    assert {(grid["input"].low, grid["input"].high) for grid in affine.grids.values()} == {(0, 255)}
    assert {(grid["input"].low, grid["input"].high) for grid in symmetric.grids.values()} == {(-127, 127)}
    assert all(int(grid["input"].zero) == 0 for grid in symmetric.grids.values())
    assert {grid["weight"].high for grid in _run(trained, weight_bits=4).grids.values()} == {7}


def test_the_plain_copy_rounds_no_activation(trained):
    made = _run(trained, activation_bits=2)
    x = torch.rand(4, 1, 8, 8)
    assert not torch.allclose(made.model(x), made.plain()(x), rtol=1e-2)
    assert torch.equal(made.model.conv1.weight, made.plain().conv1.weight)


def test_what_is_excluded_stays_in_float(trained):
    made = _run(trained, exclude=["conv1", "layer1"])
    assert not any(name == "conv1" or name.startswith("layer1") for name in made.grids)


class Tied(torch.nn.Module):
    """An autoencoder whose two halves hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_tied_weights_stay_tied(trained, method):
    recipe, _, loop = trained
    torch.manual_seed(0)
    model = Tied()
    made = quantize(recipe.with_values({"quantize.method": method, "quantize.epochs": 1}), model, loop)
    assert torch.equal(made.model.first.weight, made.model.second.weight)
    assert sum(p.numel() for p in made.model.parameters()) == sum(p.numel() for p in model.parameters())
    assert set(made.grids) == ({"first", "second", "last"} if method == "ptq" else {"last"})


def test_wrong_settings_are_one_line(trained):
    with pytest.raises(RecipeError, match=r"quantize\.exclude: the model has no module cnv1; did you mean conv1"):
        _run(trained, exclude=["cnv1"])
    with pytest.raises(RecipeError, match="lsq is symmetric"):
        _run(trained, method="lsq", activations="affine")
    recipe, _, loop = trained
    with pytest.raises(CompressionError, match="no convolution or linear layer"):
        quantize(recipe, torch.nn.Sequential(torch.nn.Flatten()), loop)


class Idle(nn.Module):
    """A layer that never runs, and one that is called by the name of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.head = nn.Linear(3, 3), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(input=x.flatten(1))


@pytest.mark.parametrize("method", ["ptq", "qat", "lsq"])
def test_a_layer_that_never_runs_is_said(trained, method):
    recipe, _, loop = trained
    changes = {"quantize.method": method, "quantize.epochs": 1}
    with pytest.raises(CompressionError, match=r"idle never ran, .* name it in quantize\.exclude"):
        quantize(recipe.with_values(changes), Idle(), loop)


def test_an_input_that_is_given_by_name_is_rounded(trained):
    recipe, _, loop = trained
    made = quantize(recipe.with_values({"quantize.exclude": ["idle"]}), Idle(), loop)
    images = torch.rand(2, 1, 8, 8)
    wanted = made.plain().head(made.grids["head"]["input"](images.flatten(1)))
    torch.testing.assert_close(made.model(images), wanted)


def test_layers_of_a_fused_transformer_run(trained):
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.body, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.body(x.squeeze(1)).mean(1))

    recipe, _, loop = trained
    model = Transformer().eval()
    made = quantize(recipe, model, loop)
    assert {"body.layers.0.linear1", "body.layers.0.linear2", "head"} <= set(made.grids)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert (made.model(images) - made.plain()(images)).abs().max() > 0  # activations are rounded
        torch.testing.assert_close(made.model(images), model(images), rtol=0.1, atol=0.1)


def test_a_training_shorter_than_its_calibration_rounds_all_the_same(trained):
    recipe, model, loop = trained
    changes = {"quantize.method": "qat", "quantize.epochs": 1, "quantize.calibrate_batches": 10_000}
    made = quantize(recipe.with_values(changes), copy.deepcopy(model), loop)
    assert all({"weight", "input"} <= set(grids) for grids in made.grids.values())
    assert loop.evaluate(made.model) > loop.evaluate(model) - 0.1
