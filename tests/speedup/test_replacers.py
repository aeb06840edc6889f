"""NNI's own ModelSpeedup with our replacers: the same shapes and outputs as ours."""

import copy
import logging

import pytest
import torch
from nni.compression.speedup import ModelSpeedup as StockSpeedup
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import REPLACERS, ModelSpeedup, load_compact, save_compact
from nni_plugins.speedup.replacers import (
    replace_channel_shuffle,
    replace_convolution,
    replace_rms_norm,
    replace_unflatten,
)
from tests.random_networks import trained_like
from tests.speedup.stock import CASES, QUIET, bake, every_second, replacers, size, stock


def net(dims, groups=1):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
    mean = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), conv(8, 8, 3, padding=1, groups=groups),
        instance(8, affine=True, track_running_stats=True), nn.ReLU(), up(8, 6, 2, stride=2), norm(6), nn.ReLU(),
        mean(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    trained_like(model)
    return model.eval()


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 8])
def test_stock_with_our_replacers_equals_ours(dims, groups):
    model = net(dims, groups)
    x = torch.randn(2, 3, *[4] * dims)
    graph = ChannelGraph.watch(model, x)
    plan = Plan(graph, {g.name: range(0, g.size, 2) for g in graph.groups if g.prunable})
    masks = plan.masks(model)
    ours = ModelSpeedup(copy.deepcopy(model), x, masks).speedup_model()
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(name), target).mul_(mask)
    quiet = logging.getLogger("quiet")
    quiet.setLevel(logging.CRITICAL)
    theirs = StockSpeedup(model, x, masks, customized_replacers=list(REPLACERS), logger=quiet).speedup_model().eval()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_the_list_that_nni_appends_to_is_a_copy():
    import nni_plugins.speedup as speedup

    speedup.REPLACERS.append("something")
    assert "something" not in speedup.REPLACERS


@pytest.mark.parametrize(
    "name",
    ["grouped conv3d", "transposed 3-d, grouped", "instance norm", "rms norm", "channel shuffle", "embedding bag"],
)
def test_what_replacers_shrank_can_be_saved_and_loaded(name, tmp_path):
    case = CASES[name]
    model, x = case.model(), case.input()
    masks = every_second(model, x)
    model = bake(model, masks)
    expected = model(x)
    speedup = ModelSpeedup(model, x, masks, exact_only=False, logger=QUIET, **replacers())
    compact = speedup.speedup_model()
    assert size(compact) < 0.7 * size(case.model())
    assert torch.allclose(compact(x), expected, atol=1e-5)
    save_compact(compact, tmp_path / "model.safetensors")
    loaded = load_compact(tmp_path / "model.safetensors", case.model)
    assert torch.equal(loaded(x), compact(x))


def test_every_module_of_torchs_is_nnis_or_ours_or_named_here():
    from nni.compression.speedup.replacement import replace_module

    from nni_plugins.speedup.replacers import REPLACERS as OURS

    ours = set(OURS[0].replace_module_func_dict)
    left = {
        name
        for name in nn.modules.__all__
        if name not in replace_module and name not in ours and not name.startswith("Lazy") and "Loss" not in name
    }
    by_updaters = {
        "GRU", "GRUCell", "LSTM", "LSTMCell", "MultiheadAttention", "RNN", "RNNBase", "RNNCell", "RNNCellBase", "Transformer",
        "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer",
    }  # fmt: skip
    containers = {"Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"}
    windows = {"CrossMapLRN2d", "LocalResponseNorm"}
    compare = {"CosineSimilarity", "PairwiseDistance", "LinearCrossEntropyOptions"}
    assert left - by_updaters - containers - windows - compare == set()


def kept(count, size, *gone):
    mask = torch.ones(1, size, *[1] * count)
    mask[:, list(gone)] = 0
    return mask


def test_unflatten():
    """NNI's inference, with sizes that the module holds."""
    model = nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 4)
    ).eval()
    weight, bias = torch.ones(24, 8), torch.ones(24)
    weight[4:12], bias[4:12] = 0, 0
    masks, x = {"0": {"weight": weight, "bias": bias}}, torch.randn(2, 8)
    model = bake(model, masks)
    with pytest.raises(RuntimeError, match="unflatten"):
        stock(model, x, masks)(x)
    compact = stock(model, x, masks, **replacers())
    assert compact[2].unflattened_size == (4, 2, 2)
    assert torch.allclose(compact(x), model(x), atol=1e-6)
    free = replace_unflatten(nn.Unflatten(1, (-1, 4)), ([kept(0, 24, *range(8))], kept(1, 6, 0, 1).expand(1, 6, 4), {}))
    assert free.unflattened_size == (-1, 4)


def test_channel_shuffle():
    shuffle = replace_channel_shuffle(nn.ChannelShuffle(4), ([kept(2, 12, 3, 4, 5)], None, {}))
    assert shuffle.groups == 3
    shuffle = replace_channel_shuffle(nn.ChannelShuffle(4), ([kept(2, 12, 0, 3, 6, 9)], None, {}))
    assert shuffle.groups == 4
    with pytest.raises(ValueError, match="a channel shuffle of 4 groups would keep different channels in each"):
        replace_channel_shuffle(nn.ChannelShuffle(4), ([kept(2, 12, 0)], None, {}))


def test_groups_that_would_keep_different_channels():
    conv = nn.Conv3d(8, 8, 1, groups=4)
    with pytest.raises(ValueError, match="a convolution of 4 groups would keep different channels in each; mask whole"):
        replace_convolution(conv, ([kept(3, 8, 0)], kept(3, 8, 0), {}))


@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_rms_norm_gives_what_it_gave(shape, eps):
    torch.manual_seed(0)
    norm = nn.RMSNorm(shape, eps=eps)
    nn.init.uniform_(norm.weight)
    x = torch.randn(2, 3, 6) * kept(1, 6, 1, 4).transpose(1, 2)
    expected = norm(x)
    norm.weight.data[..., [1, 4]] = 0
    assert torch.equal(norm(x), expected)
    mask = torch.ones(1, 3, 6)
    mask[..., [1, 4]] = 0
    small = replace_rms_norm(norm, ([mask], mask, {}))
    assert small.normalized_shape == (*shape[:-1], 4)
    assert torch.allclose(small(x[..., [0, 2, 3, 5]]), expected[..., [0, 2, 3, 5]], atol=1e-6)
    bare = replace_rms_norm(nn.RMSNorm(6, elementwise_affine=False), ([mask], mask, {}))
    assert bare.normalized_shape == (4,)


@pytest.mark.parametrize("updaters", [False, True])
def test_one_list_for_several_speedups(updaters):
    """NNI appends to the list that it is given, and would replace twice what it finds there twice."""
    from nni_plugins.speedup import MASK_UPDATERS

    given = list(REPLACERS)
    for name in ("conv3d", "glu", "conv3d"):
        case = CASES[name]
        model, x = case.model(), case.input()
        masks = every_second(model, x)
        model = bake(model, masks)
        options = {"customized_mask_updaters": MASK_UPDATERS} if updaters else {}
        speedup = StockSpeedup(copy.deepcopy(model), x, masks, logger=QUIET, customized_replacers=given, **options)
        compact = speedup.speedup_model().eval()
        assert torch.allclose(compact(x), model(x), atol=1e-6)
