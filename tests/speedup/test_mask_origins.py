"""Masks of any origin: every pruner and granularity of NNI's, and what of the model goes for them."""

import copy

import nni
import numpy as np
import pytest
import torch
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.utils import TorchEvaluator
from torch import nn
from torch.nn import functional as F

from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import RandomCNN, trained_like


class Net(nn.Module):
    """A residual block, a depthwise convolution and two linear layers, with norms between."""

    def __init__(self):
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10)
        self.b, self.n2 = nn.Conv2d(10, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.n3 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.p, self.n4 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(self.n2(self.b(F.relu(self.n1(self.a(x))))) + x)
        x = F.relu6(self.n3(self.dw(x)))
        x = F.relu(self.n4(self.p(x))).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


SIZES = {"stem": 8, "a": 10, "p": 12, "hidden": 16}


def make(seed=0):
    torch.manual_seed(seed)
    model = Net().double()
    trained_like(model, seed)
    return model


@pytest.fixture
def x():
    return torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def full(model, masks):
    """What is not masked of each layer's weight, as ``[out, in]``, by names without prefix."""
    alive = {}
    for name in ("stem", "a", "b", "dw", "p", "hidden", "head"):
        weight = model.get_submodule(name).weight
        mask = next((m for n, m in masks.items() if n.removeprefix("module.") == name), {}).get("weight")
        mask = torch.ones(()) if mask is None else torch.as_tensor(mask)
        alive[name] = (mask != 0).expand(weight.shape).flatten(2).any(2) if weight.dim() > 2 else (mask != 0)
        alive[name] = alive[name].expand(weight.shape[:2]).cpu().numpy()
    return alive


def kept(model, masks):
    """How many units must be left of each group, worked out by hand for :class:`Net`."""
    w = full(model, masks)
    norms = {n: next((m for k, m in masks.items() if k.removeprefix("module.") == n), {}).get("weight") for n in NORMS}
    off = {n: np.zeros(SIZE[n], bool) if m is None else (m.reshape(-1) == 0).numpy() for n, m in norms.items()}
    stem = ~w["stem"].any(1) | off["n0"]
    a = ~(w["a"] & ~stem).any(1) | off["n1"]
    b = ~(w["b"] & ~a).any(1) | off["n2"]
    trunk = stem & b
    dw = trunk | ~w["dw"].any(1) | off["n3"]
    p = ~(w["p"] & ~dw).any(1) | off["n4"]
    hidden = ~(w["hidden"] & ~p).any(1)
    need = {name: np.zeros(size, bool) for name, size in SIZES.items()}
    for _ in range(5):  # what is needed, found from the output backwards
        need["hidden"] = ~hidden & w["head"].any(0)
        need["p"] = ~p & w["hidden"][need["hidden"]].any(0)
        by_p = ~dw & w["p"][need["p"]].any(0)
        need["a"] = ~a & w["b"][need["stem"]].any(0)
        need["stem"] = (~stem & w["a"][need["a"]].any(0)) | (~trunk & w["dw"].any(1) & by_p)
    return {name: max(1, int(n.sum())) for name, n in need.items()}


NORMS = ("n0", "n1", "n2", "n3", "n4")
SIZE = {"n0": 8, "n1": 10, "n2": 8, "n3": 8, "n4": 12}


def masked_output(model, masks, x):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                if mask is not None:
                    getattr(model.get_submodule(name), target).mul_(torch.as_tensor(mask).cpu())
        return model(x)


def check(model, masks, x, given=None):
    """The compact model equals the masked one, and what should go is gone."""
    expected = masked_output(model, masks, x)
    left = kept(model, masks)
    speedup = ModelSpeedup(model, x, masks if given is None else given)
    compact = speedup.speedup_model()
    assert not speedup.report.put_back
    assert not speedup.report.inexact
    sizes = {name: speedup.report.removed.get(name, (size, size))[0] for name, size in SIZES.items()}
    assert sizes == left
    out = compact.eval()(x)
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max()
    return compact


# -- NNI's pruners -----------------------------------------------------------------------------------------------------

ALL = ["Conv2d", "Linear"]


def config(**settings):
    return [{"op_types": ALL, "exclude_op_names": ["head"], "sparse_ratio": 0.5, **settings}]


def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
    generator = torch.Generator().manual_seed(2)
    for _ in range(max_steps or 4):
        x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        training_step((x, torch.randint(0, 5, (8,), generator=generator)), model).backward()
        optimizer.step()


def evaluator(model):
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(train, optimizer, lambda batch, m: F.cross_entropy(m(batch[0]), batch[1]))


def norms():
    return [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.4}]


PRUNERS = {
    "l1": lambda m: L1NormPruner(m, config()),
    "l2": lambda m: L2NormPruner(m, config()),
    "fpgm": lambda m: FPGMPruner(m, config()),
    "level": lambda m: LevelPruner(m, config(sparse_ratio=0.9)),
    "taylor": lambda m: TaylorPruner(m, config(), evaluator(m), training_steps=2),
    "taylor in": lambda m: TaylorPruner(m, config(granularity="in_channel"), evaluator(m), training_steps=2),
    "slim": lambda m: SlimPruner(m, norms(), evaluator(m), training_steps=2),
    "slim global": lambda m: SlimPruner(
        m, [{**norms()[0], "global_group_id": 1}], evaluator(m), training_steps=2, regular_scale=1e-2
    ),
    "movement": lambda m: MovementPruner(m, config(), evaluator(m), warmup_step=1, cooldown_begin_step=3),
    "movement threshold": lambda m: MovementPruner(
        m,
        [{"op_types": ALL, "exclude_op_names": ["head"], "sparse_threshold": 0.498, "granularity": "out_channel", "max_sparse_ratio": 0.7}],
        evaluator(m),
        warmup_step=1,
        cooldown_begin_step=3,
    ),
    "agp": lambda m: AGPPruner(L1NormPruner(m, config(), evaluator(m)), 1, 2),
    "agp taylor": lambda m: AGPPruner(TaylorPruner(m, config(), evaluator(m), training_steps=1), 1, 2),
    "linear": lambda m: LinearPruner(L2NormPruner(m, config(), evaluator(m)), 1, 2),
    "linear level": lambda m: LinearPruner(LevelPruner(m, config(sparse_ratio=0.95), evaluator(m)), 1, 2),
    "in channel": lambda m: L1NormPruner(m, config(granularity="in_channel")),
    "out channel": lambda m: L2NormPruner(m, config(granularity="out_channel")),
    "kernels": lambda m: L1NormPruner(m, [{"op_types": ["Conv2d"], "sparse_ratio": 0.8, "granularity": [1, 1, -1, -1]}]),
    "blocks of rows": lambda m: L1NormPruner(
        m, [{"op_names": ["a", "p", "hidden"], "sparse_ratio": 0.5, "granularity": [[2], "back", -1]}]
    ),
    "blocks": lambda m: L1NormPruner(m, [{"op_types": ["Linear"], "sparse_ratio": 0.8, "granularity": [[1, 4], "front"]}]),
    "threshold": lambda m: L1NormPruner(
        m, [{"op_types": ALL, "exclude_op_names": ["head"], "sparse_threshold": 1.1, "max_sparse_ratio": 0.7}]
    ),
    "global": lambda m: L1NormPruner(m, config(global_group_id="all", max_sparse_ratio=0.8)),
    "dependent": lambda m: L1NormPruner(
        m,
        [
            {"op_names": ["stem", "b"], "sparse_ratio": 0.5, "dependency_group_id": "residual"},
            {"op_names": ["a", "dw", "p", "hidden"], "sparse_ratio": 0.3},
        ],
    ),
}  # fmt: skip
NO_TRAINING = {"l1", "l2", "fpgm", "level", "in channel", "out channel", "kernels", "blocks", "blocks of rows",
               "threshold", "global", "dependent"}  # fmt: skip
OWN_STEPS = {"taylor", "taylor in", "slim", "slim global"}


def masks_of(name, model):
    pruner = PRUNERS[name](model)
    steps = () if name in NO_TRAINING | OWN_STEPS else (4, None)
    _, masks = pruner.compress(*steps)
    pruner.unwrap_model()
    return pruner, masks


@pytest.mark.parametrize("name", PRUNERS)
def test_masks_of_nnis_pruners(name, x):
    model = make()
    _, masks = masks_of(name, model)
    assert any((m == 0).any() for targets in masks.values() for m in targets.values() if m is not None)
    check(model, masks, x)


def test_every_pruner_of_nni_is_here():
    import nni.compression.pruning as pruning

    theirs = {name for name, kind in vars(pruning).items() if isinstance(kind, type) and name.endswith("Pruner")}
    assert theirs == {
        "AGPPruner", "FPGMPruner", "L1NormPruner", "L2NormPruner", "LevelPruner", "LinearPruner", "MovementPruner",
        "SlimPruner", "TaylorPruner",
    }  # fmt: skip


def test_masks_that_the_wrappers_hold(x):
    model = make()
    pruner, masks = masks_of("l1", model)
    assert {n: {t: m.tolist() for t, m in ts.items() if m is not None} for n, ts in pruner.get_masks().items()} == {
        n: {t: m.tolist() for t, m in ts.items() if m is not None} for n, ts in masks.items()
    }
    check(model, pruner.get_masks(), x)


def test_a_pruner_after_a_speedup(x):
    """Twice pruned, twice made smaller."""
    model = make()
    _, masks = masks_of("out channel", model)
    model = check(model, masks, x)
    before = sum(p.numel() for p in model.parameters())
    pruner = L1NormPruner(model, config())
    _, masks = pruner.compress()
    pruner.unwrap_model()
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    out = speedup.speedup_model().eval()(x)
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before


# -- where channels are dead only by what comes before or after them -----------------------------------------------------


def ones(model):
    names = ("stem", "a", "b", "dw", "p", "hidden")
    return {name: {"weight": torch.ones_like(model.get_submodule(name).weight)} for name in names}


def test_what_is_read_by_nobody_who_is_read(x):
    """Nothing reads ``hidden``'s units 3 to 15, so nothing reads the ``p`` units that only they read, and so on up."""
    model = make()
    masks = ones(model)
    masks["head"] = {"weight": torch.ones_like(model.head.weight)}
    masks["head"]["weight"][:, 3:] = 0
    masks["hidden"]["weight"][:3, 5:] = 0
    masks["p"]["weight"][:5, 4:] = 0
    masks["a"]["weight"][:6, 4:] = 0
    masks["b"]["weight"][:, 6:] = 0
    assert kept(model, masks) == {"stem": 4, "a": 6, "p": 5, "hidden": 3}
    check(model, masks, x)


def test_what_comes_of_nothing(x):
    """``a``'s units 5 to 9 read only masked units of ``stem``, whose rows are masked in ``b`` too, and so on down."""
    model = make()
    masks = ones(model)
    masks["stem"]["weight"][4:] = 0
    masks["a"]["weight"][5:, :4] = 0
    masks["b"]["weight"][4:, :5] = 0
    masks["p"]["weight"][7:, :4] = 0
    masks["hidden"]["weight"][6:, :7] = 0
    assert kept(model, masks) == {"stem": 4, "a": 5, "p": 7, "hidden": 6}
    check(model, masks, x)


@pytest.mark.parametrize("seed", range(12))
def test_random_kernels(seed, x):
    model = make(seed)
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in ("stem", "a", "b", "dw", "p", "hidden", "head"):
        weight = model.get_submodule(name).weight
        kernels = (torch.rand(weight.shape[:2], generator=generator) > (0.0 if name == "dw" else 0.75)).double()
        masks[name] = {"weight": kernels.reshape(*kernels.shape, *[1] * (weight.dim() - 2)).expand(weight.shape)}
    check(model, masks, x)


def test_single_weights_in_no_pattern_leave_everything(x):
    model = make()
    masks = ones(model)
    generator = torch.Generator().manual_seed(0)
    for targets in masks.values():
        targets["weight"][torch.rand(targets["weight"].shape, generator=generator) < 0.3] = 0
    before = [p.shape for p in model.parameters()]
    check(model, masks, x)
    assert [p.shape for p in model.parameters()] == before


def test_there_are_no_other_pruners_in_nni():
    """Its older packages (``nni.compression.pytorch``, ``nni.algorithms.compression``) are gone in 3.0."""
    from importlib.util import find_spec

    assert find_spec("nni.algorithms.compression") is None
    assert find_spec("nni.compression.pytorch") is None


def random_masks(model, seed):
    """Kernels, rows, columns, biases and norms, masked at random, in some layers."""
    generator = torch.Generator().manual_seed(seed)

    def chance(*shape):
        return torch.rand(shape or (1,), generator=generator)

    share = (0.3, 0.6, 0.8, 0.9)[seed % 4]
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and chance() < 0.9:
            weight = module.weight
            kernels = (chance(*weight.shape[:2]) > share).double()
            if chance() < 0.3:
                kernels[chance(weight.shape[0]) > 0.5] = 0
            if chance() < 0.3:
                kernels[:, chance(weight.shape[1]) > 0.5] = 0
            masks[name] = {"weight": kernels.reshape(*kernels.shape, *[1] * (weight.dim() - 2))}
            if module.bias is not None and chance() < 0.5:
                masks[name]["bias"] = (chance(*module.bias.shape) > 0.5).double()
        elif isinstance(module, nn.BatchNorm2d) and module.affine and chance() < 0.3:
            masks[name] = {"weight": (chance(*module.weight.shape) > 0.5).double()}
            if chance() < 0.5:
                masks[name]["bias"] = masks[name]["weight"]
    return masks


class HalfDead(nn.Module):
    """Two groups, cut to the same channels: one channel of a unit is zero, the other is not."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.last = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 1, groups=2), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x):
        return self.last(self.up(self.first(x).relu()) * self.scale)


def test_half_a_unit_does_not_go_with_the_other_half():
    torch.manual_seed(0)
    model = HalfDead().double()
    weight, bias = torch.ones(8, 2, 1, 1), torch.ones(4)
    weight[:4, 1], bias[1] = 0, 0
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    masks = {"up": {"weight": weight, "bias": bias}}
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    assert torch.allclose(speedup.speedup_model()(x), expected)
    assert not speedup.report.put_back
    assert not speedup.report.removed


@pytest.mark.parametrize("seed", [*range(20), 59, 138])
def test_random_kernels_of_random_networks(seed):
    model = RandomCNN(seed, padded=False).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    masks = random_masks(model, seed)
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert (compact(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not speedup.report.put_back
