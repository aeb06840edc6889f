import copy

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import MagnitudePruner, MagnitudeWeightPruner, PruningError

from .nets import X, make


class Odd(nn.Module):
    """A subclass of Conv2d, a bare scale, a layer called twice, and a module under two names."""

    class MyConv(nn.Conv2d):
        pass

    def __init__(self):
        super().__init__()
        self.first = self.MyConv(3, 12, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.alias = self.twice
        self.act = nn.PReLU(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act(self.first(x)) * self.gamma
        x = self.alias(self.twice(x).relu()).relu()
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers that share their weight, as an embedding and a head do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.one, self.two = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc(self.one(x).relu() + self.two(x * 2).relu())


def test_any_module_can_be_masked():
    torch.manual_seed(0)
    net = Odd().eval()
    pruner = MagnitudePruner(net, [{"op_types": ["MyConv", "Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    dense = net(X)
    model, masks = pruner.compress()
    assert not torch.allclose(model(X), dense)
    gone = 1 - pruner.plan.cost().params / pruner.graph.cost().params
    assert gone > 0.4
    for module, parameter in (
        ("first", "weight"),
        ("first", "bias"),
        ("act", "weight"),
        ("", "gamma"),
        ("twice", "weight"),
    ):
        assert masks[module][parameter].mean() < 1, (module, parameter)
    assert "alias" not in masks
    masked = model(X)
    pruner.unwrap_model()
    assert isinstance(net.gamma, nn.Parameter)
    assert net.alias is net.twice
    with torch.no_grad():
        for module, targets in masks.items():
            for parameter, mask in targets.items():
                getattr(net.get_submodule(module), parameter).mul_(mask)
    torch.testing.assert_close(net(X), masked)


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    net, x = Tied(), torch.randn(4, 6)
    before = net(x)
    pruner = MagnitudePruner(net, [{"op_names": ["two", "stem"], "sparse_ratio": 0.5}], dummy_input=x)
    wrapped = dict(net.named_parameters())
    assert [name for name in wrapped if name.startswith(("one", "two"))] == ["one._nni_wrapper.weight"]  # one parameter
    torch.testing.assert_close(net(x), before)
    _, masks = pruner.compress()
    assert torch.equal(masks["one"]["weight"], masks["two"]["weight"])
    assert masks["one"]["weight"].mean() < 1
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    pruner.unwrap_model()
    assert net.one.weight is net.two.weight
    assert len(list(net.parameters())) == 5


def test_wrapping_changes_no_output_and_unwrapping_restores_the_model():
    net = make("residual")
    reference = copy.deepcopy(net)
    names = list(net.state_dict())
    pruner = MagnitudePruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    assert torch.equal(net(X), reference(X))
    pruner.unwrap_model()
    assert torch.equal(net(X), reference(X))
    assert sorted(net.state_dict()) == sorted(names)
    assert not any("_nni_wrapper" in name for name, _ in net.named_modules())


def test_masked_units_get_no_gradient_and_stay_dead_in_training():
    net = make("plain")
    pruner = MagnitudePruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    net, masks = pruner.compress()
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    seen = {}
    net.get_submodule("bn1").register_forward_hook(lambda _m, _i, output: seen.update(output=output))
    net.eval()(X)
    dead = masks["bn1"]["weight"] == 0
    assert dead.sum() == 8
    assert seen["output"][:, dead].abs().max() == 0


def test_a_wrapped_model_is_refused_with_the_remedy():
    net = make("plain")
    MagnitudePruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    with pytest.raises(ValueError, match=r"unwrap_model\(\)"):
        ChannelGraph.watch(net, X)


def test_attention_heads_are_masked_and_its_uncalled_projection_still_trains():
    """MultiheadAttention reads its out_proj without calling it, so that NNI's wrapper there would never act."""
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))

    net, x = Attention().train(), torch.randn(2, 7, 32)
    pruner = MagnitudePruner(net, [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.5}], dummy_input=x)
    dense = net(x)
    _, masks = pruner.compress()
    assert masks["attention.out_proj"]["weight"].mean() == masks["attention"]["in_proj_weight"].mean() == 0.5
    assert not torch.allclose(net(x), dense)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = net.attention.out_proj._nni_wrapper.weight.detach().clone()
    net(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.attention.out_proj._nni_wrapper.weight, before)
    masked = net(x)
    pruner.unwrap_model()
    with torch.no_grad():
        net.attention.out_proj.weight.mul_(masks["attention.out_proj"]["weight"])
        net.attention.in_proj_weight.mul_(masks["attention"]["in_proj_weight"])
        net.attention.in_proj_bias.mul_(masks["attention"]["in_proj_bias"])
    torch.testing.assert_close(net(x), masked)


def test_a_wrapped_model_can_be_copied_after_a_forward_and_the_copy_stands_alone():
    net = make("residual")
    pruner = MagnitudePruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], dummy_input=X)
    net, _ = pruner.compress()
    before = net(X)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(X), before)


def test_torchscript_cannot_be_masked_and_is_named():
    model = nn.Sequential(nn.Linear(4, 6), torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(6, 3))))
    with pytest.raises(
        PruningError, match=r"^1\.1 is a TorchScript module, .*: prune the model before torch\.jit\.script"
    ):
        MagnitudePruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], dummy_input=torch.randn(2, 4))


class Unlike(nn.Module):
    """Modules whose weights others read: instead of their own call, or ahead of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        ahead = nn.functional.linear(x, self.first.weight)
        x = (ahead + self.first(x)).relu()
        return self.last(nn.functional.linear(x, self.second.weight, self.second.bias).relu())


class Layer(nn.Module):
    """torch's own encoder layer, which reads its modules' weights without calling them when it evaluates."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean(1))


@pytest.mark.parametrize(("make", "shape"), [(Unlike, (4, 6)), (Layer, (2, 5, 6))])
@pytest.mark.parametrize("single", [False, True])
def test_weights_that_are_read_without_a_call_are_masked_and_trained(make, shape, single):
    """They kept what the last call had left: no gradient, and when evaluating, old weights without the masks."""
    torch.manual_seed(0)
    net, x = make().double(), torch.randn(*shape, dtype=torch.float64)
    reference = copy.deepcopy(net)
    config = [{"op_types": ["Linear"], "exclude_op_names": ["layer.self_attn.out_proj"], "sparse_ratio": 0.5}]
    pruner = MagnitudeWeightPruner(net, config) if single else MagnitudePruner(net, config, dummy_input=x)
    pruner.compress()
    masks = {f"{m}.{p}": mask for m, held in pruner.get_masks().items() for p, mask in held.items()}

    def bake():
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.mul_(masks.get(name, 1.0))

    def same():
        pruned.eval(), reference.eval()
        with torch.no_grad():
            torch.testing.assert_close(pruned(x), reference(x))
        pruned.train(), reference.train()

    pruned = net
    bake()
    same()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, reference)]
    for _ in range(3):
        for model, optimizer in zip((net, reference), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        bake()
        same()
    pruned = copy.deepcopy(net)
    same()
    pruned = net
    pruner.unwrap_model()
    assert not net._forward_pre_hooks
    assert not [key for key in vars(net) if "masked" in key]
