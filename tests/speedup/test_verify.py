"""The proof finds what is wrong, also behind what cannot be exact; and what fails leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import trained_like

X = torch.randn(2, 3, 8, 8)


def masked(model, masks):
    model = copy.deepcopy(model).eval()
    for module, targets in masks.items():
        for target, mask in targets.items():
            getattr(model.get_submodule(module), target).data.mul_(mask)
    return model


def rows(size, *gone):
    mask = torch.ones(size)
    mask[list(gone)] = 0
    return mask


def of_conv(conv, *gone):
    mask = rows(conv.out_channels, *gone)
    return {"weight": mask.view(-1, 1, 1, 1).expand(conv.weight.shape).clone(), "bias": mask}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.an, self.fc = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        trained_like(self)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):
        return self.fc(F.relu(self.an(self.a(x))).mean((2, 3)))


def test_what_is_folded_into_a_head_of_zeros_is_zero():
    """The proof fills the zeros for a while; what masked channels leave behind must not be read off then."""
    model = Head()
    masks = {"a": of_conv(model.a, 1, 5)}
    expected, bias = masked(model, masks)(X), model.fc.bias.detach().clone()
    compact = ModelSpeedup(model, X, masks).speedup_model().eval()
    assert model.a.out_channels == 6
    assert not model.fc.weight.any()
    assert torch.equal(model.fc.bias, bias)
    assert torch.allclose(compact(X), expected)


class Counts(nn.Module):
    """A padded consumer (folding is not exact), and beside it a division by the number of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.an, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.p, self.q = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 1)
        trained_like(self)

    def forward(self, x):
        y = self.p(x)
        return self.b(F.relu(self.an(self.a(x)))) + self.q(torch.relu(y) / torch.full_like(y, y.shape[1]))


def test_a_wrong_group_is_found_behind_an_inexact_one():
    model = Counts()
    masks = {"a": of_conv(model.a, 0, 1), "p": of_conv(model.p, 0)}
    expected = masked(model, masks)(X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model().eval()
    assert speedup.report.inexact == ["b: zero padding makes the border differ"]
    assert speedup.plan.counts["a"] == 6
    assert [line.split(":")[0] for line in speedup.report.put_back] == ["p"]
    assert model.p.out_channels == 9
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert torch.allclose(compact(X)[inside], expected[inside], atol=1e-5)


class Demanding(nn.Module):
    """Raises, in its own way, if it is not as wide as it was."""

    def __init__(self, demand):
        super().__init__()
        self.demand = demand
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(x * self.demand(x))))


@pytest.mark.parametrize(
    "demand", [lambda x: 1 / (x.shape[1] // 8), lambda x: {8: 1.0}[x.shape[1]], lambda x: (1.0,)[8 - x.shape[1]]]
)
def test_whatever_a_forward_raises_puts_its_group_back(demand):
    model = Demanding(demand)
    gone = rows(8, 2, 3)
    masks = {
        name: {"weight": gone.unsqueeze(1).expand(-1, n).clone(), "bias": gone} for name, n in [("a", 6), ("b", 8)]
    }
    x = torch.randn(3, 6)
    expected = masked(model, masks)(x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model().eval()
    assert (model.a.out_features, model.b.out_features) == (8, 6)
    assert len(speedup.report.put_back) == 1
    assert torch.allclose(compact(x), expected, atol=1e-6)


class Breaks(nn.Module):
    """Runs on values only as wide as it was: what replay without data cannot see."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        x = torch.relu(self.a(x))
        if x.shape[1] < 8 and not x.is_meta:
            raise MemoryError("no")
        return self.b(x)


def test_a_failure_leaves_the_weights_as_they_were():
    model = Breaks()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    gone = rows(8, 2, 3)
    masks = {"a": {"weight": gone.unsqueeze(1).expand(-1, 6).clone(), "bias": gone}}
    with pytest.raises(MemoryError):
        ModelSpeedup(model, torch.randn(3, 6), masks).speedup_model()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert (model.a.out_features, model.b.in_features) == (8, 8)


class Picks(nn.Module):
    """Goes on with the rows whose score is above the median; only rounding, or double precision, tells scores apart."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x):
        h = F.relu(self.hidden(x))
        score = (h / h.norm(dim=1, keepdim=True)).pow(2).sum(1) + 1e-10 * x[:, 0]
        return self.head(h[torch.nonzero(score > score.median()).flatten()])


def test_picks_that_hang_on_rounding_are_proved_in_double_precision():
    torch.manual_seed(0)
    model, x = Picks(), torch.randn(500, 8)
    gone = list(range(0, 64, 2))
    masks = {"hidden": {"weight": rows(64, *gone)[:, None].expand(64, 8).clone(), "bias": rows(64, *gone)}}
    before = masked(model, masks).double()
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert compact.hidden.out_features == 32
    assert speedup.report.put_back == []
    assert speedup.report.relative_error < 1e-9
    assert any("double precision" in line for line in speedup.report.inexact)
    assert compact.head.weight.dtype == torch.float32
    torch.testing.assert_close(compact.double()(x.double()), before(x.double()))


class Grows(nn.Module):
    """Goes over its rows so often that rounding grows a hundred thousand times; its grid is of single precision."""

    def __init__(self):
        super().__init__()
        self.shift, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x):
        grid = torch.linspace(0, 1, 8).float()
        h = torch.sigmoid(self.head(F.relu(self.hidden(x + self.shift(grid)))))
        for _ in range(24):
            h = 3.9 * h * (1 - h)
        return h


def test_rounding_that_grows_is_told_from_an_error_in_double_precision():
    torch.manual_seed(0)
    model, x = Grows(), torch.randn(50, 8)
    gone = list(range(9, 64, 2))
    masks = {"hidden": {"weight": rows(64, *gone)[:, None].expand(64, 8).clone(), "bias": rows(64, *gone)}}
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert compact.hidden.out_features == 64 - len(gone)
    assert speedup.report.put_back == []
    assert speedup.report.relative_error < 1e-8
    assert any("rounding grows" in line for line in speedup.report.inexact)
    assert torch.get_default_dtype() == torch.float32
