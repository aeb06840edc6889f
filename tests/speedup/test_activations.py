"""Masks of what goes into modules and comes out of them: the compact model equals NNI's own masked one."""

import copy

import pytest
import torch
from nni.compression.base.setting import PruningSetting
from nni.compression.pruning import L1NormPruner
from torch import nn
from torch.nn import functional as F

from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import trained_like


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.block = Block()
        self.dw, self.n2, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)
        self.ln, self.pool = nn.LayerNorm(12), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.block(self.act(self.bn(self.stem(x))))
        x = self.up(F.relu6(self.n2(self.dw(x))))
        x = self.pool(F.gelu(x)).flatten(1)
        return self.head(F.silu(self.hidden(self.ln(x))))


X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make():
    torch.manual_seed(0)
    model = Net().double()
    trained_like(model)
    return model.eval()


def masked_output(model, masks):
    """Multiply the masks where NNI's wrappers do: into weights, and on the way in and out of modules."""
    model = copy.deepcopy(model)
    for name, targets in masks.items():
        module = model.get_submodule(name)
        for target, mask in targets.items():
            if target.startswith("_output_"):
                module.register_forward_hook(lambda module, args, out, mask=mask: out * mask)
            elif target.startswith("_input_"):
                module.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
            else:
                getattr(module, target).data.mul_(mask)
    with torch.no_grad():
        return model(X)


def channels(size, *gone):
    mask = torch.ones(1, size, 1, 1, dtype=torch.float64)
    mask[:, list(gone)] = 0
    return mask


C, WIDE = channels(8, 1, 5), channels(12, 0, 7)
#: Mask -> how many channels of the trunk (stem), of up and of hidden must be left.
CASES = {
    "conv": ({"stem": {"_output_0": C}}, (8, 12, 16)),
    "norm": ({"bn": {"_output_0": C}}, (8, 12, 16)),
    "both norms of a residual": ({"bn": {"_output_0": C}, "block.norm": {"_output_0": C}}, (6, 12, 16)),
    "activation": ({"act": {"_output_0": C}, "block.norm": {"_output_0": C}}, (6, 12, 16)),
    "what a block gives": ({"block": {"_output_0": C}}, (8, 12, 16)),
    "what a block gives, and gets": ({"block": {"_output_0": C}, "block.conv": {"_input_0": C}}, (6, 12, 16)),
    "depthwise": ({"dw": {"_output_0": C}}, (8, 12, 16)),
    "into depthwise": ({"dw": {"_input_0": C}}, (8, 12, 16)),
    "into depthwise, and out of its norm": ({"dw": {"_input_0": C}, "n2": {"_output_0": C}}, (8, 12, 16)),
    "into a convolution": ({"up": {"_input_input": C}}, (8, 12, 16)),
    "into a pool": ({"pool": {"_input_0": WIDE}}, (8, 12, 16)),
    "out of a pool": ({"pool": {"_output_0": WIDE}}, (8, 12, 16)),
    "norm across": ({"ln": {"_output_0": WIDE.flatten(1)}}, (8, 12, 16)),
    "linear": ({"hidden": {"_output_0": channels(16, *range(5)).flatten(1)}}, (8, 12, 11)),
    "into linear": ({"head": {"_input_0": channels(16, *range(7)).flatten()}}, (8, 12, 9)),
    "the head": ({"head": {"_output_0": channels(5, 1).flatten()}}, (8, 12, 16)),
    "the whole model": ({"": {"_output_0": channels(5, 1).flatten(1)}}, (8, 12, 16)),
    "all the batch": ({"act": {"_output_0": C.expand(4, 8, 6, 6)}}, (8, 12, 16)),
    "weights too": (
        {"stem": {"weight": C.reshape(8, 1, 1, 1), "_output_0": C}, "block.norm": {"_output_0": C}},
        (6, 12, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_compact_model_equals_the_masked_one(case):
    masks, left = CASES[case]
    model = make()
    expected = masked_output(model, masks)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model()
    assert (compact.stem.out_channels, compact.up.out_channels, compact.hidden.out_features) == left
    assert not speedup.report.put_back
    assert not speedup.report.inexact
    assert (compact(X) - expected).abs().max() <= 1e-9 * expected.abs().max()


# -- what cannot be said by parameters ---------------------------------------------------------------------------------

WRONG = {
    "positions": ({"act": {"_output_0": channels(8, 1)[:, :, :, :1] * torch.eye(6)}}, "act._output_0 is masked at single positions"),
    "a part of the positions": ({"act": {"_output_0": torch.ones(6, 1).index_fill(0, torch.tensor([1]), 0)}}, "act._output_0 is masked at single positions"),
    "a size": ({"act": {"_output_0": channels(9, 1)}}, r"act._output_0 has shape \(4, 8, 6, 6\), its mask \(1, 9, 1, 1\)"),
    "dimensions": ({"act": {"_output_0": channels(8, 1)[None]}}, "act._output_0 has shape"),
    "a norm that would not give zero": ({"bn": {"_input_0": C}}, None),
    "what is used elsewhere": ({"block.conv": {"_output_0": C}, "block.norm": {"_input_0": C}}, None),
    "an output that is not there": ({"act": {"_output_3": C}}, "act._output_3 is no tensor that the model computes"),
    "an input that is not there": ({"act": {"_input_key": C}}, "act._input_key is no tensor"),
    "the model's input": ({"stem": {"_input_0": channels(3, 1)}}, "stem._input_0 is no tensor that the model computes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_masks_are_refused_in_one_line(case):
    masks, words = WRONG[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    if words is None:  # it can be said after all
        expected = masked_output(model, masks)
        assert (ModelSpeedup(model, X, masks).speedup_model()(X) - expected).abs().max() < 1e-9
        return
    with pytest.raises(ValueError, match=words) as caught:
        ModelSpeedup(model, X, masks).speedup_model()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("1._output_0", "1._output_0 is made by aten.sigmoid, whose result no mask of parameters makes zero"),
        ("2._input_0", "2._input_0 is read by aten.native_layer_norm, for which no mask of parameters makes it zero"),
    ],
)
def test_what_no_mask_of_parameters_would_do(target, words):
    module, _, name = target.partition(".")
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=words):
        ModelSpeedup(model, torch.randn(2, 3), {module: {name: C.flatten()}}).speedup_model()
    # an activation that reads the mask's own channels twice over
    model = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"reshaped|whole channels"):
        ModelSpeedup(model, torch.randn(2, 3), {"1": {"_output_0": torch.eye(4)[:2]}}).speedup_model()


# -- NNI's own ---------------------------------------------------------------------------------------------------------


def test_norms_aligned_with_convolutions():
    """NNI's own example: a norm's output is masked as the convolution before it, so that nothing is left behind."""
    model = make()
    pairs = [("stem", "bn"), ("block.conv", "block.norm"), ("dw", "n2")]
    align = [
        {
            "op_names": [norm],
            "target_names": ["_output_"],
            "target_settings": {
                "_output_": {
                    "align": {"module_name": conv, "target_name": "weight", "dims": [0]},
                    "granularity": "per_channel",
                    "apply_method": "mul",
                }
            },
        }
        for conv, norm in pairs
    ]
    config = [
        {"op_names": ["stem", "block.conv", "dw"], "sparse_ratio": 0.5, "dependency_group_id": 1},
        {"op_names": ["up", "hidden"], "sparse_ratio": 0.5},
        *align,
    ]
    pruner = L1NormPruner(model, config)
    with torch.no_grad():
        model(X)  # NNI learns the shapes of outputs from a run
        _, masks = pruner.compress()
        expected = model(X)
    assert masks["bn"]["_output_0"].shape == (1, 8, 1, 1)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model()
    assert (compact.stem.out_channels, compact.hidden.out_features) == (4, 8)
    assert not speedup.report.inexact
    assert (compact(X) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_module_of_ones_own():
    """A setting registered for a user's module masks what the module gives, as NNI's tutorial for BERT does."""
    PruningSetting.register(
        "Block",
        {
            "_output_": {
                "align": {"module_name": "stem", "target_name": "weight", "dims": [0]},
                "apply_method": "mul",
                "granularity": "per_channel",
            }
        },
    )
    try:
        model = make()
        pruner = L1NormPruner(
            model, [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_names": ["block"], "target_names": ["_output_"]}]
        )
        with torch.no_grad():
            model(X)
            _, masks = pruner.compress()
            expected = model(X)
        pruner.unwrap_model()
        compact = ModelSpeedup(model, X, masks).speedup_model()
        assert (compact(X) - expected).abs().max() <= 1e-9 * expected.abs().max()
    finally:
        del PruningSetting.registry["Block"]


class Twice(nn.Module):
    """One layer called twice, a module with two outputs, one with keyword arguments, one that gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.pair, self.named = nn.Linear(4, 6), nn.Linear(6, 6), Pair(), Named()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.again(self.again(self.first(x)).relu()).relu()
        a, b = self.pair(x)
        return self.head(self.named(value=a + b)["value"])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x).relu(), self.b(x)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, scale=None, *, value):
        return {"value": self.layer(value).relu()}


SIX = channels(6, 2, 3).flatten()
TWICE = {
    "called twice": {"again": {"_output_0": SIX}},
    "the second of two": {"pair": {"_output_1": SIX}},
    "both of two": {"pair": {"_output_0": SIX, "_output_1": SIX}},
    "by keyword": {"named": {"_input_value": SIX}},
    "of a dictionary": {"named": {"_output_value": SIX}},
}


@pytest.mark.parametrize("case", TWICE)
def test_calls_and_containers(case):
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    for name, targets in TWICE[case].items():
        module = reference.get_submodule(name)
        outputs = {t.removeprefix("_output_"): m for t, m in targets.items() if t.startswith("_output_")}

        def on_output(module, args, kwargs, out, outputs=outputs):
            if isinstance(out, dict):
                return {key: value * outputs.get(key, 1) for key, value in out.items()}
            if isinstance(out, tuple):
                return tuple(value * outputs.get(str(i), 1) for i, value in enumerate(out))
            return out * outputs.get("0", 1)

        def on_input(module, args, kwargs, targets=targets):
            return args, {key: value * targets.get(f"_input_{key}", 1) for key, value in kwargs.items()}

        module.register_forward_hook(on_output, with_kwargs=True)
        module.register_forward_pre_hook(on_input, with_kwargs=True)
    expected = reference(x)
    compact = ModelSpeedup(model, x, TWICE[case]).speedup_model()
    assert (compact(x) - expected).abs().max() <= 1e-9
