from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
from nni.mutable import SampleValidationError
from nni.nas.nn.pytorch import ModelSpace, MutableLinear
from nni.nas.space import ModelStatus, SimplifiedModelSpace
from torch import nn

from nni_plugins.search import PrunedSpace
from nni_plugins.search.pruned_space import architecture
from nni_plugins.search.surveys import longest, stages
from nni_plugins.speedup import load_compact, save_compact
from tests.search.spaces import SHAPE, Loose, Net, Plain, joint


def settled(model: nn.Module) -> nn.Module:
    """Batch norms that do not hide what is in front of them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def masked(model: nn.Module, masks: dict[str, dict[str, torch.Tensor]]) -> nn.Module:
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(modules[name], target).mul_(mask)
    return model.eval()


def test_a_plain_model_is_compacted_to_the_shares_and_computes_what_the_masked_one_does() -> None:
    torch.manual_seed(0)
    model = settled(Plain())
    before = copy.deepcopy(model.state_dict())
    space = PrunedSpace(model, SHAPE, ratios=(0.25, 0.5, 1.0))
    assert set(space.simplify()) == {"keep:first", "keep:second"}
    pruned = space.prune({"keep:first": 0.25, "keep:second": 0.5})
    assert [pruned.model.first.out_channels, pruned.model.second.out_channels] == [2, 8]
    x = torch.randn(SHAPE)
    torch.testing.assert_close(pruned.model.eval()(x), masked(copy.deepcopy(model), pruned.masks)(x))
    assert pruned.report.relative_error is not None
    assert pruned.report.relative_error < 1e-5
    for name, value in model.state_dict().items():  # the space still holds the whole model
        assert torch.equal(value, before[name])


def test_the_units_kept_are_those_of_largest_norm_or_of_the_importance_that_is_given() -> None:
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.first.weight.mul_(torch.arange(1.0, 9.0)[:, None, None, None])
        model.second.weight.div_(10)
    sample = {"keep:first": 0.25, "keep:second": 1.0}
    assert PrunedSpace(model, SHAPE).prune(sample).plan.kept["first"].tolist() == [6, 7]
    backwards = PrunedSpace(model, SHAPE, importance=lambda model, graph: {"first": -torch.arange(8.0)})
    assert backwards.prune(sample).plan.kept["first"].tolist() == [0, 1]


def test_all_architectures_of_a_space_are_frozen_pruned_and_saved(tmp_path: Path) -> None:
    space = joint()
    assert set(space.labels) == {"keep:stem", "keep:body", "keep:mix"}
    assert set(space.simplify()) == {*space.labels, "width", "kernel", "depth", "kind"}
    state, seen = np.random.RandomState(0), set()
    for _ in range(5):
        sample: dict[str, Any] = {}
        model = space.random(sample, state)
        seen.add((sample["kind"], sample["depth"], sample["width"]))
        dense = space.architecture(sample)
        assert dense.stem[0].out_channels == sample["width"]
        assert len(list(dense.body.children())) == sample["depth"]
        assert model.stem[0].out_channels == round(sample["width"] * sample["keep:stem"])
        x = torch.randn(SHAPE)
        expected = model.eval()(x)
        save_compact(model, tmp_path / "compact.safetensors")
        again = load_compact(tmp_path / "compact.safetensors", lambda sample=sample: space.architecture(sample))
        torch.testing.assert_close(again.eval()(x), expected)
    assert len(seen) > 2


def test_groups_differ_with_the_choice_and_those_that_are_not_there_are_ignored() -> None:
    space = PrunedSpace(Net, SHAPE, ratios=(0.5, 1.0), groups="group")
    assert {"keep:mix", "keep:mix.1", "keep:body.2.0"} <= set(space.labels)
    sample: dict[str, Any] = dict.fromkeys(space.labels, 0.5)
    wide = space.prune({**sample, "width": 16, "kernel": 1, "depth": 1, "kind": "wide"})
    assert set(wide.plan.kept) == {"stem.0", "body.0.0", "mix"}
    narrow = space.prune({**sample, "width": 16, "kernel": 1, "depth": 2, "kind": "narrow"})
    assert {"stem.0", "body.1.0", "mix.1"} <= set(narrow.plan.kept)


def test_a_list_of_beginnings_leaves_the_rest_whole() -> None:
    space = PrunedSpace(Net, SHAPE, groups=["body"])
    assert list(space.labels) == ["keep:body"]
    model = space.freeze({"keep:body": 0.25, "width": 16, "kernel": 3, "depth": 2, "kind": "wide"})
    assert [model.stem[0].out_channels, model.body[0][0].out_channels, model.mix.out_channels] == [16, 4, 12]


def test_a_space_with_mutables_of_its_own_is_made_again() -> None:
    space = PrunedSpace(Loose(outputs=7), SHAPE, ratios=lambda label: nni.uniform(label, 0.2, 1.0))
    model = space.freeze({"hidden": 12, "keep:layers.1": 0.34})
    assert [model.layers[1].out_features, model.layers[3].out_features] == [4, 7]


@pytest.mark.parametrize("known", ["by name", "by class"])
def test_a_trial_gets_a_few_hundred_bytes_and_makes_the_same_model(known: str) -> None:
    space = (
        PrunedSpace.named("tests.search.spaces:joint")
        if known == "by name"
        else PrunedSpace(Net, SHAPE, groups="stage")
    )
    sample: dict[str, Any] = {}
    here = space.random(sample, np.random.RandomState(3))
    payload = nni.dump(SimplifiedModelSpace.from_model(space, None).freeze(sample))
    assert len(payload) < 1000
    there = nni.load(payload)
    assert there.status == ModelStatus.Frozen
    made = there.executable_model()
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in here.named_parameters()}
    assert made(torch.zeros(SHAPE)).shape == (2, 10)


def test_the_architecture_of_a_named_space_has_all_channels_and_needs_no_shares() -> None:
    sample = {"width": 16, "kernel": 3, "depth": 2, "kind": "narrow"}
    model = architecture("tests.search.spaces:joint", sample)
    assert model.stem[0].out_channels == 16
    assert len(list(model.body.children())) == 2


def test_a_sample_of_another_space_is_refused() -> None:
    space = PrunedSpace(Plain(), SHAPE)
    with pytest.raises(SampleValidationError, match="keep:second"):
        space.freeze({"keep:first": 0.5})
    with pytest.raises(SampleValidationError):
        space.freeze({"keep:first": 0.4, "keep:second": 1.0})
    wide = PrunedSpace(Plain(), SHAPE, ratios=lambda label: nni.uniform(label, 0.0, 2.0))
    with pytest.raises(SampleValidationError, match=r"a share that is kept must be in \(0, 1\]"):
        wide.freeze({"keep:first": 1.5, "keep:second": 1.0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": "stages"}, "must be 'group', 'stage' or a list"),
        ({"groups": ["first", "third"]}, "no channel group begins with 'third'; there are first, second"),
        ({"ratios": (0.5, 1.5)}, r"different numbers in \(0, 1\]"),
        ({"ratios": (0.5, 0.5)}, "different numbers"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrunedSpace(Plain(), SHAPE, **arguments)


def test_a_model_in_which_nothing_can_go_says_so() -> None:
    with pytest.raises(ValueError, match="no channel group of this model can be pruned"):
        PrunedSpace(nn.Linear(4, 2), (1, 4))


def test_labels_of_the_space_inside_must_be_others() -> None:
    class Taken(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            width = nni.choice("keep:first", [4, 8])
            self.first, self.second = MutableLinear(4, width), MutableLinear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    with pytest.raises(ValueError, match="has a mutable called 'keep:first' too"):
        PrunedSpace(Taken(), (1, 4))


def test_names_are_cut_where_they_begin_to_differ() -> None:
    assert stages(["model.conv1", "model.layer1.0.conv1", "model.layer1.1.conv1"]) == ["model.conv1", "model.layer1"]
    assert stages(["0", "3", "3:1"]) == ["0", "3"]
    assert stages(["only"]) == ["only"]
    assert longest("layer1.0.conv", ["layer", "layer1", "layer1.0"]) == "layer1.0"
    assert longest("fc1:1", ["fc1", "fc1:1"]) == "fc1:1"
    assert longest("layer10.conv", ["layer1"]) is None
