"""Every pruner in a recipe: what it removes, what it is asked, and what is refused."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from nni_plugins.pruners import PRUNERS, GroupPruner
from nni_plugins.pruners.choices import CHOICES
from nni_plugins.training import RecipeError, compress, prepare_dense, recipe_from_dict
from nni_plugins.training.artefacts import load_masks


@pytest.fixture(scope="module")
def base():
    return recipe_from_dict(
        {
            "model": {"name": "resnet8", "arguments": {"width": 8}},
            "data": {"batch_size": 128, "limit": 640},
            "train": {"epochs": 2, "warmup_epochs": 0, "threads": 1},
            "finetune": {"epochs": 1, "learning_rate": 0.02},
        }
    )


@pytest.fixture(scope="module")
def dense(base, tmp_path_factory):
    return prepare_dense(base, tmp_path_factory.mktemp("dense"), lambda line: None)


def sparsity(folder):
    masks = [mask for targets in load_masks(folder / "masks.safetensors").values() for mask in targets.values()]
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


ALL = {
    "block": {"prune.sparsity": 0.2},
    "dynamic_sparse": {"prune.arguments": {"total_steps": 8, "update_every": 2}},
    "hybrid": {"prune.arguments": {"total_steps": 10}},
    "l0": {"prune.arguments": {"training_steps": 8}},
    "lottery_ticket": {"prune.arguments": {"total_steps": 4, "rounds": 2}},
    "magnitude": {},
    "random": {},
    "synaptic": {"prune.arguments": {"training_steps": 5}},
    "taylor": {"prune.arguments": {"training_steps": 2}},
    "weight_gradient": {"prune.arguments": {"training_steps": 2}},
    "weight_magnitude": {},
}
ASKED = {"block": 0.2}
SINGLE = ("dynamic_sparse", "lottery_ticket", "weight_gradient", "weight_magnitude")


@pytest.mark.parametrize("name", ALL)
def test_every_pruner_runs_in_a_recipe(base, dense, tmp_path, name):
    metrics = compress(base.with_values({"prune.pruner": name, **ALL[name]}), tmp_path, dense)
    assert metrics["relative_error"] < 1e-5
    if name in SINGLE:
        assert sparsity(tmp_path) == pytest.approx(0.5, abs=0.01)
    elif name == "synaptic":
        assert sparsity(tmp_path) > 0.3
    else:
        assert metrics["macs"] <= (1 - ASKED.get(name, 0.5) + 0.02) * dense.macs


def test_all_names_are_tried():
    assert set(PRUNERS) - set(ALL) <= {"order"}


@pytest.mark.parametrize("name", ["weight_magnitude", "hybrid"])
def test_single_weights_stay_masked_when_the_compact_model_is_fine_tuned(base, dense, tmp_path, name):
    from nni_plugins.training.artefacts import load_model
    from nni_plugins.training.data import build_data

    recipe = base.with_values({"prune.pruner": name, "steps": ["prune", "speedup", "finetune"], **ALL[name]})
    compress(recipe, tmp_path, dense)
    model = load_model(recipe, build_data(recipe), tmp_path / "compact.safetensors")
    zero = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert zero / total == pytest.approx(0.5, abs=0.06)


@pytest.fixture(scope="module")
def wide(base, tmp_path_factory):
    """A net and its dense model of which half of the time is the channels': of base's, a seventh, the rest overhead."""
    recipe = base.with_values({"model.arguments": {"width": 32}, "train.epochs": 1, "finetune.epochs": 0})
    return recipe, prepare_dense(recipe, tmp_path_factory.mktemp("wide"), lambda line: None)


def test_a_share_of_the_latency_goes(wide, tmp_path):
    recipe, dense = wide
    metrics = compress(recipe.with_values({"prune.target": "latency", "prune.sparsity": 0.2}), tmp_path, dense)
    assert metrics["macs"] < 0.95 * dense.macs


def test_the_latency_is_shared_out_by_groups(base, dense, tmp_path, monkeypatch):
    # of a net of half a millisecond the clock says little, and one channel less may be a kernel less: MACs stand in
    monkeypatch.setattr("nni_plugins.training.latency_budget.in_turns", lambda *_: [1.0, 0.8])
    monkeypatch.setattr(
        "nni_plugins.pruners.targets.latency_table",
        lambda graph, *_: SimpleNamespace(total_ms=lambda counts: graph.cost_model.totals(counts)[0]),
    )
    values = {"prune.target": "latency", "prune.sparsity": 0.2, "prune.groups.layer1": 0.6}
    metrics = compress(base.with_values(values), tmp_path, dense)
    assert metrics["macs"] == pytest.approx(0.8 * dense.macs, rel=0.05)
    assert metrics["sparsity"]["layer1.0.conv1"] > metrics["sparsity"].get("layer3.0.conv1", 0.0)


def test_prefixes_share_weights_out(base, dense, tmp_path):
    values = {"prune.pruner": "weight_magnitude", "prune.groups.layer3": 0.9, "finetune.epochs": 0}
    compress(base.with_values(values), tmp_path, dense)
    masks = load_masks(tmp_path / "masks.safetensors")
    assert 1 - float(masks["layer3.0.conv1"]["weight"].mean()) == pytest.approx(0.9, abs=0.06)
    assert float(masks["layer1.0.conv1"]["weight"].mean()) > 0.3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune.pruner": "weight_magnitude", "prune.target": "latency"},
         "prune.target is latency, which weight_magnitude does not have, since it removes single weights; it takes pa"),
        ({"prune.pruner": "synaptic", "prune.target": "channels"}, "since it removes kernels; it takes macs, params"),
        ({"prune.pruner": "block", "prune.scope": "local"}, "since it removes whole blocks; leave it out"),
        ({"prune.pruner": "block", "prune.groups.layer1": 0.5}, "prune.groups: block removes whole blocks, to which it"),
        ({"prune.pruner": "l0", "prune.arguments.schedul": 1}, "prune.arguments.schedul is not an argument of l0"),
        ({"prune.pruner": "weight_magnitude", "prune.round_to": 8}, "prune.round_to: weight_magnitude removes single"),
        ({"prune.pruner": "lottery_ticket", "prune.arguments.round": 3}, "is not an argument of lottery_ticket; did"),
        ({"prune.pruner": "weight_gradient", "prune.shifts.conv1": 1.0}, "ranks no channel groups"),
    ],
)  # fmt: skip
def test_what_a_method_does_not_have_is_refused_before_the_dense_training(base, tmp_path, values, message):
    with pytest.raises(RecipeError) as caught:
        prepare_dense(base.with_values(values), tmp_path, lambda line: pytest.fail("it trains"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pruner", "name", "value", "message"),
    [
        (
            "magnitude",
            "normalise",
            "foo",
            "prune.arguments.normalise is 'foo' (text); of magnitude it must be one of de",
        ),
        ("synaptic", "normalise", "l2", "of synaptic it must be one of row, layer, null"),
        ("taylor", "variant", "gates", "of taylor it must be one of weight, gate, activation"),
        ("weight_magnitude", "density", "er", "of weight_magnitude it must be one of null, uniform, erk, global"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_when_the_recipe_is_read(base, pruner, name, value, message):
    tree = {"prune": {"pruner": pruner, "arguments": {name: value}}}
    with pytest.raises(RecipeError, match=r"^my\.yml: prune\.arguments") as caught:
        recipe_from_dict(tree, "my.yml")
    assert message in str(caught.value)
    with pytest.raises(RecipeError):
        base.with_values({"prune.pruner": pruner, f"prune.arguments.{name}": value})


def test_the_choices_are_those_of_the_methods():
    from nni_plugins.pruners import blocks, densities, dynamic, targets, taylor, weights

    assert set(CHOICES) == set(PRUNERS) - {"order"}
    for name, options in CHOICES.items():
        shown = inspect.signature(PRUNERS[name]).parameters
        for option, allowed in options.items():
            assert option in shown
            assert shown[option].default in allowed
        if issubclass(PRUNERS[name], GroupPruner):
            assert set(options["normalise"]) == {"default", *targets.NORMALISATIONS}
    assert set(CHOICES["weight_magnitude"]["normalise"]) == {None, *weights.NORMALISE}
    assert set(CHOICES["weight_magnitude"]["density"]) == {None, "global", *densities.DENSITIES}
    assert set(CHOICES["dynamic_sparse"]["method"]) == set(dynamic.METHODS)
    assert CHOICES["block"]["score"] == blocks.SCORES
    assert CHOICES["taylor"]["variant"] == taylor.VARIANTS


def test_a_model_without_channel_groups_loses_weights(tmp_path):
    recipe = recipe_from_dict(
        {
            "model": {"name": "mlp", "arguments": {"hidden": []}},
            "data": {"limit": 320},
            "train": {"epochs": 1, "threads": 1},
            "prune": {"pruner": "weight_magnitude"},
            "finetune": {"epochs": 0},
        }
    )
    dense = prepare_dense(recipe, tmp_path, lambda line: None)
    compress(recipe, tmp_path / "out", dense)
    assert sparsity(tmp_path / "out") == pytest.approx(0.5, abs=0.01)
    assert torch.is_tensor(next(iter(load_masks(tmp_path / "out" / "masks.safetensors").values()))["weight"])
