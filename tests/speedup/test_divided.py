"""Weights that are divided by their norm: masks of all that they are made of make no NaN."""

import pytest
import torch
from torch import nn

from nni_plugins.speedup import ModelSpeedup


def masked_rows(model, prefix, rows):
    """Masks of every parameter of a layer, zero in ``rows``."""
    masks = {}
    for name, parameter in model.named_parameters():
        if name.startswith(prefix) and parameter.shape[0] == 8:
            mask = torch.ones_like(parameter, requires_grad=False)
            mask[rows] = 0
            module, _, target = name.rpartition(".")
            masks.setdefault(module, {})[target] = mask
    return masks


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("last", [False, True], ids=["goes", "stays"])
def test_a_weight_norm_whose_parts_are_all_masked(normed, last):
    torch.manual_seed(0)
    layer = normed(nn.Conv2d(3, 8, 3, padding=1))
    model = nn.Sequential(layer, nn.ReLU(), nn.Identity() if last else nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    masks = masked_rows(model, "0", [0, 3, 4])
    whole = layer(x).detach()
    whole[:, [0, 3, 4]] = 0
    wanted = model[2](torch.relu(whole)).detach()
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert torch.allclose(compact(x), wanted, atol=1e-5)
    assert compact[0].weight.shape[0] == (8 if last else 5)
    assert torch.isfinite(compact[0].weight).all()
    assert all(torch.isfinite(p).all() for p in compact.parameters())
    assert wanted.abs().max() > 0.1
    assert not speedup.report.put_back


@pytest.mark.parametrize("training", [False, True])
def test_a_spectral_norm_by_hooks_loses_rows(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1)).train(training)
    x = torch.randn(2, 3, 6, 6)
    speedup = ModelSpeedup(model, x, masked_rows(model, "0", [0, 3, 4]))
    compact = speedup.speedup_model()
    assert compact[0].weight_orig.shape[0] == 5
    assert speedup.report.relative_error < 1e-5
    assert not speedup.report.stayed
    assert torch.isfinite(compact.train()(x)).all()


def test_inputs_of_a_weight_norm_go_though_its_rows_do():
    """Where all of a row is masked, nothing is known of its columns; those of the other rows say which inputs go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.utils.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))
    masks = {"0": {"weight": torch.ones(8, 3), "bias": torch.ones(8)}, "2": {"weight_v": torch.ones(6, 8)}}
    masks["0"]["weight"][:5], masks["0"]["bias"][:5] = 0, 0
    masks["2"]["weight_v"][:, :5], masks["2"]["weight_v"][2:4] = 0, 0
    masks["2"] |= {"weight_g": masks["2"]["weight_v"][:, 5:6].clone(), "bias": masks["2"]["weight_v"][:, 5].clone()}
    speedup = ModelSpeedup(model, torch.randn(2, 3), masks)
    compact = speedup.speedup_model()
    assert compact[2].weight_v.shape == (4, 3)
    assert not speedup.report.stayed
