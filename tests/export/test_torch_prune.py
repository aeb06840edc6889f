import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nni_plugins.export import from_torch_prune, to_torch_prune
from nni_plugins.pruners import MagnitudePruner, MagnitudeWeightPruner
from nni_plugins.speedup import ModelSpeedup

X = torch.rand(2, 3, 8, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def pruned():
    model = net()
    pruner = MagnitudePruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    wrapped, masks = pruner.compress()
    expected = wrapped(X)
    pruner.unwrap_model()
    return model, masks, expected


def test_our_masks_become_its_reparametrisation_and_come_back():
    model, masks, expected = pruned()
    held = dict(model.named_parameters())
    assert to_torch_prune(model, masks) is model
    assert prune.is_pruned(model)
    assert torch.equal(model(X), expected)
    assert model[0].weight_orig is held["0.weight"]  # an optimizer goes on with it
    assert torch.equal(model[0].weight_mask, masks["0"]["weight"])
    found = from_torch_prune(model)
    assert {m: set(t) for m, t in found.items()} == {m: set(t) for m, t in masks.items()}
    assert all(torch.equal(found[m][t], masks[m][t]) for m in masks for t in masks[m])
    assert not prune.is_pruned(model)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in held.items()}
    compact = ModelSpeedup(model, X, found).speedup_model()
    assert compact[0].out_channels == 8
    torch.testing.assert_close(compact(X), expected, rtol=0, atol=1e-5)


def test_remove_makes_a_mask_permanent():
    model, masks, expected = pruned()
    to_torch_prune(model, masks)
    for module, targets in masks.items():
        for target in targets:
            prune.remove(model.get_submodule(module), target)
    assert torch.equal(model(X), expected)
    assert (model[0].weight[masks["0"]["weight"] == 0] == 0).all()
    assert not any("_orig" in name or "_mask" in name for name in model.state_dict())


def test_training_goes_on_under_its_masks():
    model, masks, _ = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    to_torch_prune(model, masks).train()
    before = model[3].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    model(X)
    assert (model[3].weight[masks["3"]["weight"] == 0] == 0).all()
    assert not torch.equal(model[3].weight, before)


def test_its_masks_and_ours_are_both_kept():
    model = net()
    prune.random_unstructured(model[3], "weight", amount=0.3)
    theirs = model[3].weight_mask.clone()
    ours = {"3": {"weight": (torch.rand(16, 16, 3, 3) < 0.5).float()}}
    to_torch_prune(model, ours)
    assert torch.equal(from_torch_prune(model)["3"]["weight"], theirs * ours["3"]["weight"])


def test_its_masks_go_on_in_a_pruner_of_ours():
    model = net()
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    masks = from_torch_prune(model)
    pruner = MagnitudeWeightPruner(model, [{"op_names": ["3"], "sparse_ratio": 0.8}])
    pruner.update_masks(masks)
    _, more = pruner.compress()
    assert (more["3"]["weight"] <= masks["3"]["weight"]).all()
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_attention_and_recurrent_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.rnn = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 8, batch_first=True)

        def forward(self, x):
            return self.rnn(self.attention(x, x, x)[0])[0]

    model, x = Net(), torch.rand(2, 5, 16)
    pruner = MagnitudeWeightPruner(
        model, [{"op_names": ["attention", "attention.out_proj", "rnn"], "sparse_ratio": 0.5}], scope="global"
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    reference = copy.deepcopy(model)
    to_torch_prune(model, masks)
    for step in range(2):
        with torch.no_grad():
            for module, targets in masks.items():
                for target, mask in targets.items():
                    plain = getattr(reference.get_submodule(module), target)
                    plain.copy_((getattr(model.get_submodule(module), f"{target}_orig")) * mask)
        torch.testing.assert_close(model(x), reference(x))
        with torch.no_grad():  # as an optimizer's step would
            model.attention.out_proj.weight_orig.add_(0.1 * (step + 1))
            model.rnn.weight_hh_l0_orig.mul_(1.5)
    prune.remove(model.attention.out_proj, "weight")
    model(x)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    mask = (torch.rand(20, 8) < 0.5).float()
    to_torch_prune(model, {"embed": {"weight": mask}, "head": {"weight": mask}})
    assert model.embed.weight_orig is model.head.weight_orig
    from_torch_prune(model)
    assert model.embed.weight is model.head.weight
    assert (model.embed.weight[mask == 0] == 0).all()


def test_what_is_wrong_is_said_and_nothing_is_changed():
    model, masks, _ = pruned()
    with pytest.raises(ValueError, match=r"0\.gamma is no parameter"):
        to_torch_prune(model, {**masks, "0": {"weight": masks["0"]["weight"], "gamma": torch.ones(2)}})
    with pytest.raises(ValueError, match="its mask"):
        to_torch_prune(model, {"0": {"weight": torch.ones(3)}})
    assert not prune.is_pruned(model)
    MagnitudeWeightPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ValueError, match=r"unwrap_model\(\) first"):
        to_torch_prune(model, masks)
    with pytest.raises(ValueError, match="nothing in the model"):
        from_torch_prune(net())


def test_masks_without_a_parameter_are_passed_over():
    model = net()
    to_torch_prune(model, {"3": {"weight": torch.ones(16, 16, 3, 3), "bias": None, "_output_0": torch.ones(16)}})
    assert list(from_torch_prune(model)["3"]) == ["weight"]
