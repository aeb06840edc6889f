"""Batch norms folded into the layers before them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.training.fold_norms import fold_norms


def _with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


LAYERS = {
    "conv": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (2, 3, 6, 6)),
    "conv without bias, grouped": (nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), (2, 3, 9)),
    "conv3d": (nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), (2, 1, 5, 5, 5)),
    "linear": (nn.Linear(5, 8), nn.BatchNorm1d(8), (3, 5)),
    "transposed": (nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), (2, 3, 6, 6)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "no affine": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), (2, 3, 6, 6)),
}


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_norm_goes_into_the_layer_that_feeds_it(layer, norm, shape):
    model = _with_statistics(nn.Sequential(layer, norm, nn.ReLU()))
    x = torch.randn(shape)
    before = model(x)
    assert fold_norms(model, x) == ["1"]
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """Norms that must stay: read twice, before the layer, of a shared layer, with statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.norm2, self.after = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.shared, self.norm3, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.batch, self.norm5 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.fine, self.norm6 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.twice(x)
        y = self.norm1(y) + y
        y = self.after(self.norm2(y))
        y = self.norm3(self.shared(y)) + self.norm4(self.shared(y))
        y = self.norm5(self.batch(y))
        assert y.dim() == 4  # asking for a size is not reading
        z = self.fine(F.relu(y))
        assert z.shape[1] == 4
        return self.norm6(z)


def test_only_what_nobody_else_reads_is_folded():
    model = _with_statistics(Odd())
    x = torch.randn(4, 3, 5, 5)
    before = model(x)
    assert fold_norms(model, x) == ["norm6"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_modes_are_left_alone():
    model = _with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()))
    fold_norms(model, torch.randn(2, 3, 6, 6))
    assert not any(module.training for module in model.modules())


def test_a_norm_that_has_two_names_is_folded_under_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)
            self.body = nn.Sequential(self.conv, self.norm)

        def forward(self, x):
            return self.body(x)

    model, x = _with_statistics(Twice()), torch.randn(2, 3, 6, 6)
    before = model(x)
    assert fold_norms(model, x) == ["norm"]
    assert isinstance(model.body[1], nn.Identity)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("width", [6, 8])
def test_a_norm_over_another_dimension_than_the_linear_layers_stays(width):
    model, x = _with_statistics(nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(8))), torch.randn(2, 8, 5)
    before = model(x)
    assert fold_norms(model, x) == []
    torch.testing.assert_close(model(x), before)
