"""The shipped models: sizes that are published, shapes, and arguments."""

import pytest
import torch

from nni_plugins.pruners import MagnitudePruner
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.training import RecipeError, build_model, recipe_from_dict


def model_of(name, shape=(3, 32, 32), classes=10, seed=0, **arguments):
    return build_model(recipe_from_dict({"model": {"name": name, "arguments": arguments}}), shape, classes, seed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The ResNets have 0.27M and 0.85M in the paper (table 6), here with option B; MobileNetV2: torchvision's 3,504,872
    # less a head of 1,000 classes, plus one of 10.
    [("resnet20", 272_474), ("resnet56", 855_770), ("mobilenetv2", 3_504_872 - 1_281_000 + 12_810)],
)
def test_published_sizes(name, parameters):
    assert sum(parameter.numel() for parameter in model_of(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "resnet8", "resnet20", "resnet56", "mobilenetv2", "staged"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_shapes_and_seeds(name, shape):
    state = torch.get_rng_state()
    model = model_of(name, shape, 7).eval()
    assert torch.equal(state, torch.get_rng_state())
    images = torch.randn(2, *shape)
    assert model(images).shape == (2, 7)
    assert torch.equal(model(images), model_of(name, shape, 7).eval()(images))
    assert not torch.equal(model(images), model_of(name, shape, 7, seed=1).eval()(images))


def test_widths():
    assert model_of("resnet20", width=8).fc.in_features == 32
    assert model_of("small_cnn", widths=[4, 6], depth=1).head.in_features == 6
    assert model_of("mlp", hidden=[5]).layer1.out_features == 5
    assert model_of("mobilenetv2", width=0.5).head.in_features == 1280


@pytest.mark.parametrize("block", ["plain", "residual", "inverted"])
@pytest.mark.parametrize("changes", [{"depth": 2, "kernel": 5}, {"depth": [2, 1, 3], "activation": "silu", "width": 8}])
def test_every_architecture_of_a_staged_net_can_be_pruned(block, changes):
    images = torch.randn(2, 1, 8, 8)
    model = model_of("staged", (1, 8, 8), block=block, **changes).eval()
    assert model(images).shape == (2, 10)
    pruner = MagnitudePruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=images, target="macs")
    _, masks = pruner.compress()
    assert {name.partition(".")[0] for name in pruner.plan.kept} >= {"stage1", "stage2", "stage3"}
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, images, masks)
    speedup.speedup_model()
    assert speedup.report.relative_error < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet20", {"widht": 8}, "model.arguments.widht is not an argument of resnet20; did you mean width?"),
        ("resnet20", {"width": "wide"}, "model.arguments do not fit resnet20"),
        ("small_cnn", {"widths": [-1]}, "model.arguments do not fit small_cnn"),
        ("staged", {"block": "bottleneck"}, "block is 'bottleneck'; it must be one of plain, residual, inverted"),
        ("staged", {"activation": "tanh"}, "activation is 'tanh'"),
        ("staged", {"kernel": 4}, "kernel is 4; it must be odd"),
        ("staged", {"depth": [1, 2]}, "one for each of 3 stages"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(RecipeError) as caught:
        model_of(name, **arguments)
    assert message in str(caught.value)


def test_shape_that_is_not_known():
    with pytest.raises(RecipeError, match=r"model\.arguments\.shape is missing"):
        model_of("mlp", shape=None)


def test_own_model_that_is_no_model(tmp_path):
    (tmp_path / "own_no_model.py").write_text("def build(): return 3\n")
    with pytest.raises(RecipeError, match="it returned int, not a torch module"):
        build_model(recipe_from_dict({"model": {"name": "own_no_model:build"}}, folder=tmp_path))
