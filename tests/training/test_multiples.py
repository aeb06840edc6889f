"""``prune.round_to: auto``: candidates are pruned and timed, and one of them is kept."""

import copy
import json

import pytest
import torch

from nni_plugins.channels import ChannelGraph
from nni_plugins.training import CompressionError, RecipeError, compress, prepare_dense, recipe_from_dict
from nni_plugins.training.loop import Loop
from nni_plugins.training.multiples import CANDIDATES, Tried, best, choose
from nni_plugins.training.prune import prune

TREE = {
    "model": {"name": "resnet8", "arguments": {"width": 16}},
    "data": {"limit": 400},
    "train": {"epochs": 1, "threads": 1},
    "prune": {"round_to": "auto", "arguments": {"tolerance": 0.1}},
    "finetune": {"epochs": 2},
}


def _tried(**realised):
    return [
        Tried(int(name[1:]), None if value is None else 0.5, None, value, "" if value is not None else "does not fit")
        for name, value in realised.items()
    ]


@pytest.mark.parametrize(
    ("realised", "chosen"),
    [
        ({"m1": 0.5, "m4": 0.6, "m8": 0.9, "m16": 0.7}, 8),
        ({"m1": 0.5, "m4": 0.87, "m8": 0.9, "m16": 0.7}, 4),  # near enough, and freer
        ({"m1": 0.9, "m4": 0.9, "m8": 0.9, "m16": 0.9}, 1),
        ({"m1": -0.5, "m4": -0.1, "m8": -0.3, "m16": None}, 1),  # none is real
        ({"m1": None, "m4": None, "m8": 0.1, "m16": None}, 8),
        ({"m1": None, "m4": -0.2, "m8": -0.1, "m16": None}, 4),
    ],
)
def test_the_most_real_saving_wins(realised, chosen):
    assert best(_tried(**realised)) == chosen


@pytest.fixture(scope="module")
def recipe():
    return recipe_from_dict(TREE)


@pytest.fixture(scope="module")
def dense(recipe, tmp_path_factory):
    return prepare_dense(recipe, tmp_path_factory.mktemp("dense"), lambda line: None)


@pytest.fixture
def parts(recipe, dense):
    from nni_plugins.training import build_data
    from nni_plugins.training.dense import dense_model

    data = build_data(recipe)
    model = dense_model(recipe, data, dense.path)
    return model, Loop(recipe, data, "test"), ChannelGraph.watch(model, data.example)


def test_each_is_pruned_and_timed(recipe, parts):
    model, loop, graph = parts
    before = copy.deepcopy(model.state_dict())
    chosen, tried = choose(recipe, model, loop, graph)
    assert [one.round_to for one in tried] == list(CANDIDATES)
    assert chosen == best(tried)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one in tried:
        if one.note:
            assert one.macs is one.time is one.realised is None
            continue
        assert 0.35 < one.macs < 0.61
        assert 0.1 < one.time < 1.3
        assert one.realised == pytest.approx((1 - one.time) / (1 - one.macs))
    assert sum(not one.note for one in tried) >= 3


def test_what_fits_nowhere_is_one_line(recipe, parts):
    far = recipe.with_values({"prune.sparsity": 0.98, "prune.max_sparsity": 0.3})
    with pytest.raises(
        CompressionError, match=r"prune\.round_to: auto: no multiple of 1, 4, 8, 16 fits: prune \(magni"
    ):
        choose(far, *parts)


def test_the_pipeline_keeps_what_was_chosen(recipe, dense, tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def stop(value):
        seen.append(value)
        if len(seen) == 2:  # the first epoch is kept
            raise Stop

    with pytest.raises(Stop):
        compress(recipe, tmp_path, dense, stop)
    file = tmp_path / "timed.json"
    known = json.loads(file.read_text())["round_to"]
    assert known["chosen"] in CANDIDATES
    other = 8 if known["chosen"] == 4 else 4
    file.write_text(json.dumps({"round_to": known | {"chosen": other}}))  # as if the times had been others
    metrics = compress(recipe, tmp_path, dense)
    assert metrics["round_to"]["chosen"] == other  # the fine-tuning that was cut off goes on with its own masks
    groups = json.loads((tmp_path / "plan.json").read_text())["groups"]
    assert groups
    assert all(len(item["kept"]) % other == 0 for item in groups.values() if len(item["kept"]) < item["size"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prune.target": "latency"}, r"^parameters: prune\.round_to: auto looks for what saves time"),
        ({"supernet.epochs": 1}, r"^parameters: prune\.round_to: auto times one pruned model"),
        ({"prune.round_to": "automatic"}, r"is 'automatic' \(text\); it must be a whole number, at least 1, or auto$"),
        ({"prune.round_to": 0}, r"prune\.round_to is 0; it must be at least 1$"),
    ],
)
def test_nonsense_is_refused(recipe, changes, line):
    with pytest.raises(RecipeError, match=line):
        recipe.with_values(changes)


@pytest.mark.parametrize(
    ("pruner", "line"),
    [("nni:L1NormPruner", "does not round"), ("weight_magnitude", "to which it means nothing; leave it out")],
)
def test_a_pruner_that_does_not_round_is_refused_before_training(recipe, tmp_path, pruner, line):
    with pytest.raises(RecipeError, match=rf"^prune\.round_to: {pruner} .*{line}"):
        prepare_dense(recipe.with_values({"prune.pruner": pruner, "prune.arguments": {}, "seed": 9}), tmp_path)


def test_a_bare_prune_wants_a_number(recipe, parts):
    with pytest.raises(RecipeError, match=r"prune\.round_to: auto is for nni-plugins compress"):
        prune(recipe, *parts)
