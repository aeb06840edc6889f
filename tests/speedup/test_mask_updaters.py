"""NNI's own ModelSpeedup with our replacers and mask updaters, on a small net of each module type."""

import copy
import gc
import logging

import pytest
import torch
from nni.compression.pruning import L1NormPruner, SlimPruner
from nni.compression.speedup.replacer import Replacer
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.speedup import MASK_UPDATERS, ModelSpeedup
from tests.random_networks import trained_like
from tests.speedup.stock import CASES, bake, both, every_second, head, replacers, rows, size, stock


def close(compact, expected, x, tolerance=1e-5):
    with torch.no_grad():
        return bool((compact(x) - expected).abs().max() <= tolerance * expected.abs().max())


def attempt(model, masks, x, expected, **options):
    """'fails', 'unpruned', 'wrong' or 'right': what the stock speedup makes of it."""
    try:
        compact = stock(model, x, masks, **options)
        right = close(compact, expected, x)
    except Exception:
        return "fails"
    return "wrong" if not right else "right" if size(compact) < size(model) else "unpruned"


@pytest.mark.parametrize("name", CASES)
def test_masks_that_agree(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    masks = every_second(model, x)
    model = bake(model, masks)
    expected = model(x)
    ours = ModelSpeedup(
        copy.deepcopy(model), x, masks, exact_only=False, customized_replacers=replacers()["customized_replacers"]
    )
    assert close(ours.speedup_model(), expected, x)
    compact = stock(model, x, masks, **both())
    assert close(compact, expected, x)
    assert [p.shape for p in compact.parameters()] == [p.shape for p in ours.bound_model.parameters()]
    assert size(compact) < 0.85 * size(model)
    # and what NNI makes of it without the one or the other
    assert (attempt(model, masks, x, expected) == "right") == (case.needs == "nothing")
    assert (attempt(model, masks, x, expected, **replacers()) == "right") == (case.needs != "updaters")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_masks_that_do_not_agree(name, seed):
    """Rows of each layer, chosen alone: halves of a gate, parts of heads, sums whose terms lose other channels."""
    case = CASES[name]
    model, x = case.model(), case.input()
    masks = rows(model, case.rows, share=0.6, seed=seed)
    model = bake(model, masks)
    expected = model(x)
    compact = stock(model, x, masks, **both())
    assert close(compact, expected, x)
    if name not in ("group norm", "channel shuffle"):  # there NNI takes a part of the masks back, beforehand
        ours = ModelSpeedup(copy.deepcopy(model), x, masks, exact_only=False)
        assert size(compact) <= size(ours.speedup_model())


def test_masks_that_do_not_agree_are_too_much_for_nni():
    """So that the test above is worth something: most of its cases fail, or come out wrong, with NNI alone."""
    outcomes = {}
    for name in ("glu", "pixel shuffle", "residual of conv3d", "attention", "lstm", "transposed 3-d", "group norm"):
        model, x = CASES[name].model(), CASES[name].input()
        masks = rows(model, CASES[name].rows, share=0.6, seed=0)
        model = bake(model, masks)
        outcomes[name] = attempt(model, masks, x, model(x))
    assert "right" not in outcomes.values(), outcomes


# -- what batch norm leaves behind -------------------------------------------------------------------------------------


def norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 1), *head(2, 6),
    )  # fmt: skip
    trained_like(model)
    return model.eval()


X = torch.randn(2, 3, 6, 6)


def test_constants_go_into_biases_where_nni_drops_them():
    """Convolutions are masked, their norms not: each masked channel is a constant, which NNI forgets."""
    model = norms()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    model = bake(model, masks)
    expected = model(X)
    assert attempt(model, masks, X, expected) == "wrong"
    compact = stock(model, X, masks, **both())
    assert compact[3].weight.shape[1] == 4
    assert close(compact, expected, X)
    assert compact[3].bias is not None  # made for what was left behind


def test_masked_norms_take_their_convolutions_with_them():
    """What SlimPruner masks, weight and bias of a batch norm, NNI's speedup does not see."""
    model = norms()
    masks = {
        "1": {"weight": torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1]), "bias": torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])}
    }
    model = bake(model, masks)
    expected = model(X)
    assert attempt(model, masks, X, expected) == "unpruned"
    compact = stock(model, X, masks, **both())
    assert compact[0].out_channels == 5
    assert close(compact, expected, X)
    assert SlimPruner  # its masks are these


def test_masks_of_activations():
    model = norms()
    keep = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    masks = {
        "0": {"weight": keep.reshape(8, 1, 1, 1).expand(8, 3, 1, 1).clone()},
        "1": {"_output_0": keep.reshape(1, 8, 1, 1)},
    }
    reference = copy.deepcopy(model)
    reference[0].weight.data.mul_(masks["0"]["weight"])
    expected = reference[2:](reference[:2](X) * keep.reshape(1, 8, 1, 1))
    compact = stock(model, X, masks, **both())
    assert compact[0].out_channels == 5
    assert close(compact, expected, X)


# -- the updater itself ------------------------------------------------------------------------------------------------


def test_nni_goes_on_alone_where_the_model_cannot_be_watched(monkeypatch, caplog):
    model = bake(norms(), {})
    masks = {"0": {"weight": torch.ones(8, 3, 1, 1), "bias": torch.ones(8)}}
    masks["0"]["weight"][:3], masks["0"]["bias"][:3] = 0, 0

    def refuse(*given, **options):
        raise RuntimeError("cannot\nbe watched")

    monkeypatch.setattr(ChannelGraph, "watch", refuse)
    with caplog.at_level(logging.WARNING):
        compact = stock(model, X, masks, **both())
    assert compact[0].out_channels == 5
    assert "cannot be watched, so NNI infers the masks: cannot" in caplog.text


def test_wrong_masks_are_named_in_one_line():
    with pytest.raises(ValueError, match=r"0.weight has shape \(8, 3, 1, 1\), its mask \(3, 3, 1, 1\)") as caught:
        stock(norms(), X, {"0": {"weight": torch.ones(3, 3, 1, 1)}}, **both())
    assert "\n" not in str(caught.value)


def test_one_list_serves_many_speedups_and_keeps_none():
    import nni_plugins.speedup as speedup

    updaters, given = list(MASK_UPDATERS), replacers()["customized_replacers"]
    case = CASES["conv3d"]
    for _ in range(2):
        model, x = case.model(), case.input()
        masks = every_second(model, x)
        compact = stock(model, x, masks, customized_replacers=list(given), customized_mask_updaters=updaters)
        assert size(compact) < size(model)
    assert len(updaters) == len(MASK_UPDATERS)
    gc.collect()
    assert len(updaters[0]._found) == 0
    speedup.MASK_UPDATERS.append("something")
    assert "something" not in speedup.MASK_UPDATERS


def test_ours_takes_the_lists_too():
    """With mask updaters, our ModelSpeedup is NNI's."""
    case = CASES["attention"]
    model, x = case.model(), case.input()
    masks = every_second(model, x)
    model = bake(model, masks)
    expected = model(x)
    compact = ModelSpeedup(model, x, masks, **both()).speedup_model().eval()
    assert close(compact, expected, x)
    assert compact.mha.num_heads == 2


class Named(nn.Module):
    """Modules called with keywords, which NNI's replacer asserts against."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv3d(8, 4, 1)

    def forward(self, x):
        x = self.b(input=self.n(input=self.a(x)).relu())
        return self.c(input=x[:, :, None]).mean((2, 3, 4))


def test_modules_called_with_keywords():
    torch.manual_seed(0)
    model = Named()
    trained_like(model)
    model.eval()
    masks = rows(model, ["a", "b"])
    model = bake(model, masks)
    expected = model(X)
    assert attempt(model, masks, X, expected) == "fails"
    compact = stock(model, X, masks, **both())
    assert compact.b.in_channels == int(masks["a"]["bias"].sum())
    assert close(compact, expected, X)


class Mine(Replacer):
    """A user's own replacer: it exchanges one module, and says so."""

    def replace_modules(self, speedup):
        for node, info in speedup.node_infos.items():
            if node.op == "call_module" and node.target == "a":
                old = speedup.bound_model.a
                keep = (info.output_masks != 0).flatten(0, 1).any(0).nonzero().flatten()
                new = nn.Linear(old.in_features, len(keep))
                new.weight.data, new.bias.data = old.weight.data[keep] * 1, old.bias.data[keep] * 1
                speedup.bound_model.a = new
                info.replaced = True


def test_a_users_own_replacer_goes_first():
    case = CASES["attention"]
    model, x = case.model(), case.input()
    masks = every_second(model, x)
    model = bake(model, masks)
    given = [Mine(), *replacers()["customized_replacers"]]
    compact = stock(model, x, masks, customized_replacers=given, customized_mask_updaters=list(MASK_UPDATERS))
    assert compact.a.out_features == 8
    assert close(compact, model(x), x)
