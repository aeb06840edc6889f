"""Blocks: what is found, that a removed block equals a masked one, and what it saves."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.rehearse import settled
from nni_plugins.channels.replay import Replay
from nni_plugins.channels.stand_in import Passing, stand_in
from tests.block_nets import (
    BasicBlock,
    ConvNext,
    KeywordModel,
    Mlp,
    MoEBlock,
    RandomResidual,
    ResNet,
    Transformer,
    trained,
)

IMAGE = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def tensors(out):
    out = out["logits"] if isinstance(out, dict) else out
    return out[0] if isinstance(out, tuple) else out


def without(model, graph, names):
    """Return a copy of a model with stand-ins for what goes with the named blocks."""
    small = deepcopy(model)
    for name, result in Plan(graph, {}, names).stand_ins().items():
        stand_in(small.get_submodule(name), result)
    return small


def masked(model, plan):
    """Return a copy of a model with the plan's masks in its weights."""
    copy = deepcopy(model)
    for module, targets in plan.masks(copy).items():
        for target, mask in targets.items():
            getattr(copy.get_submodule(module), target).data.mul_(mask)
    return copy


def error(model, graph, names, *inputs, **keywords):
    """How far the model without blocks is from the model in which they are masked."""
    with torch.no_grad():
        expected = tensors(masked(model, Plan(graph, {}, names))(*inputs, **keywords))
        actual = tensors(without(model, graph, names)(*inputs, **keywords))
        assert (expected - tensors(model(*inputs, **keywords))).abs().max() > 1e-6  # the block did something
    return (actual - expected).abs().max().item() / expected.abs().max().item()


def balanced(model):
    """Let every expert get some tokens: nothing but the input makes one of them likely."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


def kinds(graph, **wanted):
    found = {block.name: block.kind for block in graph.blocks if block.removable}
    return {name: found.get(name.replace("__", ".")) for name in wanted} == wanted


def counted_macs(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def resnet():
    model = trained(ResNet())
    return model, ChannelGraph.watch(model, IMAGE)


def test_residual_blocks_of_a_resnet(resnet):
    model, graph = resnet
    assert kinds(graph, layer1__0="residual", layer1__1="residual", layer2__1="residual")
    for name in ("layer1.0", "layer1.1", "layer2.1", "layer1"):
        assert graph.block(name).exact
        assert error(model, graph, [name], IMAGE) < 1e-12
    assert error(model, graph, ["layer1.0", "layer1.1", "layer2.1"], IMAGE) < 1e-12


def test_branches_of_a_block_that_changes_the_size(resnet):
    """The main path and the shortcut of a strided block are both branches; not both may go."""
    model, graph = resnet
    main, short = "layer2.0.bn2", "layer2.0.downsample"
    assert kinds(graph, layer2__0__downsample="branch", layer2__0__bn2="branch")
    gone = Plan(graph, {}, [main]).removal.modules
    assert set(gone) == {f"layer2.0.{name}" for name in ("conv1", "bn1", "conv2", "bn2")}
    for name in (main, short):
        assert error(model, graph, [name], IMAGE) < 1e-12
        assert error(model, graph, [name], IMAGE[:1, :, :13, :9]) < 1e-12  # sizes follow
    with pytest.raises(ValueError, match="nothing of the model's input would reach its output"):
        Plan(graph, {}, [main, short])


def test_a_stem_of_relu6_is_no_relu():
    """relu(x + 0) is x only where x is not negative, and relu6 only below 6."""

    class Net(nn.Module):
        def __init__(self, first, then):
            super().__init__()
            self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), first
            self.block = BasicBlock(8, 8)
            self.block.relu = then

        def forward(self, x):
            return self.block(self.first(self.stem(x))).mean((2, 3))

    cases = [
        (nn.ReLU(), nn.ReLU(), "residual"),
        (nn.ReLU6(), nn.ReLU(), "residual"),
        (nn.ReLU6(), nn.ReLU6(), "residual"),
        (nn.ReLU(), nn.ReLU6(), "plain"),
        (nn.Identity(), nn.ReLU(), "plain"),
        (nn.SiLU(), nn.ReLU(), "plain"),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), nn.ReLU(), "residual"),
        (nn.Sigmoid(), nn.LeakyReLU(), "residual"),
        (nn.LeakyReLU(), nn.LeakyReLU(), "plain"),
    ]
    for first, then, kind in cases:
        model = trained(Net(first, then))
        graph = ChannelGraph.watch(model, IMAGE, rehearse=False)
        assert graph.block("block").kind == kind, (first, then)
        assert graph.block("block").exact == (kind == "residual")
        if kind == "residual":
            assert error(model, graph, ["block"], IMAGE) < 1e-12


@pytest.mark.parametrize("scale", [False, True])
def test_a_transformer_block_its_attention_and_its_mlp(scale):
    model = trained(Transformer(scale=scale))
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    assert kinds(graph, blocks__0="residual", blocks__1__attn="branch", blocks__2__mlp="branch")
    for names in (["blocks.0"], ["blocks.1.attn"], ["blocks.2.mlp"], ["blocks.0", "blocks.1.attn", "blocks.2.mlp"]):
        assert error(model, graph, names, TOKENS) < 1e-12
    gone = graph.block("blocks.1.attn").gone
    assert {"blocks.1.attn.qkv.weight", "blocks.1.norm1.weight"} <= gone  # nobody needs the norm in front of it
    assert "blocks.1.attn.proj" not in {block.name for block in graph.blocks}  # says the same as the attention


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer(norm_first):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first),
        3,
        enable_nested_tensor=not norm_first,
    )
    model = trained(nn.Sequential(nn.Linear(6, 16), encoder, nn.Linear(16, 4)))
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    first = graph.block("1.layers.0")
    assert (first.kind, first.exact) == (("residual", True) if norm_first else ("plain", False))
    assert first.reason == ("" if norm_first else "its input is changed on the way, not added to")
    for name in ("1.layers.0.self_attn", "1.layers.1.linear2", "1.layers.1.self_attn"):
        assert graph.block(name).exact
        assert Replay(Plan(graph, {}, [name]), TOKENS).run(model) is None
    small = without(model, graph, ["1.layers.0"])
    shorter = deepcopy(model)
    del shorter[1].layers[0]
    assert torch.equal(small(TOKENS), shorter(TOKENS))


def test_a_block_with_permutes_and_its_own_scale():
    model = trained(ConvNext())
    graph = ChannelGraph.watch(model, IMAGE, rehearse=False)
    for i in range(3):
        assert graph.block(f"stages.{i}").kind == "residual"
        assert error(model, graph, [f"stages.{i}"], IMAGE) < 1e-12


def test_keywords_tuples_and_attributes_that_the_parent_reads():
    model, ids = trained(KeywordModel()), torch.randint(20, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph = ChannelGraph.watch(model, inputs, rehearse=False)
    assert kinds(graph, layers__1="residual", layers__0__self_attn="branch", layers__2__mlp="branch")
    for name in ("layers.0", "layers.1", "layers.0.self_attn", "layers.2.mlp"):
        assert error(model, graph, [name], **inputs) < 1e-12
    small = without(model, graph, ["layers.1"])
    assert isinstance(small.layers[1], Passing)
    assert small.layers[1].attention_type == "full"
    assert small.layers[1].self_attn.heads == 2  # what a parent may read of a part that is no module any more
    assert small.layers[1](hidden_states=torch.ones(1), attention_mask=None) == (torch.ones(1), None)


@pytest.mark.parametrize("into", ["add", "put"])
def test_experts(into):
    model = balanced(trained(Transformer(MoEBlock, depth=2, into=into)))
    x, many = TOKENS[:1, :1], torch.randn(4, 40, 6, dtype=torch.float64)  # one token: two experts get none
    graph = ChannelGraph.watch(model, x, rehearse=False)
    names = [f"blocks.{i}.moe.experts.{j}" for i in range(2) for j in range(4)]
    experts = [graph.block(name) for name in names]
    assert all(block.kind == "branch" and block.exact and block.params == experts[0].params for block in experts)
    asleep = [block for block in experts if block.sibling]
    assert asleep
    assert all(block.macs == 0 for block in asleep)
    assert all(block.macs > 0 for block in experts if not block.sibling)
    for name in names:
        assert error(model, graph, [name], many) < 1e-12  # more tokens than were watched
        assert Replay(Plan(graph, {}, [name]), x).run(model) is None
    assert error(model, graph, names[:3] + names[5:], many) < 1e-12
    assert error(model, graph, ["blocks.0.moe"], many) < 1e-12


def test_experts_that_are_stacked_in_one_parameter_go_together():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.weight = nn.Linear(6, 4), nn.Parameter(torch.ones(4, 6, 6))

        def forward(self, x):
            chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
            for number in range(4):
                out[chosen == number] += x[chosen == number] @ self.weight[number]
            return x + out

    model = trained(nn.Sequential(nn.Linear(6, 6), Stacked()))
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    assert graph.block("1").exact
    assert graph.block("1").reason == "its 4 experts are stacked in one parameter, and go together"
    assert error(model, graph, ["1"], TOKENS) < 1e-12


def test_all_blocks_are_rehearsed(resnet):
    model, graph = resnet
    assert [b.removable for b in graph.rehearsed_blocks(model, IMAGE).blocks] == [b.removable for b in graph.blocks]


def test_a_replay_sends_tokens_where_the_watched_run_did():
    """Weights change when units go; where tokens go must not, or the replay would run other operators."""
    model = trained(Transformer(MoEBlock, depth=2))
    graph = ChannelGraph.watch(model, TOKENS)
    assert all(group.prunable for group in graph.groups if group.name.endswith("fc1"))
    kept = {group.name: [0] for group in graph.groups if group.name.endswith("fc1")}
    assert Replay(Plan(graph, kept), TOKENS).run(model) is None


def test_what_is_used_elsewhere_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 16)
            self.a, self.b, self.c = Mlp(16, 8), Mlp(16, 8), Mlp(16, 8)
            self.b.fc2.weight = self.c.fc2.weight

        def forward(self, x):
            x = self.embed(x)
            for _ in range(2):
                x = x + self.a(x)
            x = x + self.b(x)
            return x * self.c(x).sum()

    model = trained(Net())
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    assert graph.block("a").exact  # called twice, the same way
    assert error(model, graph, ["a"], TOKENS) < 1e-12
    assert not graph.block("b").removable
    assert graph.block("b").reason == "b.fc2.weight is used elsewhere, too"
    with pytest.raises(ValueError, match=r"block 'b' cannot be removed: b\.fc2\.weight is used elsewhere"):
        Plan(graph, {}, ["b"])


def test_one_module_that_is_called_in_different_ways():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp(6, 8)
            self.same = ConvNext.Block(6)

        def forward(self, x):
            x = x + self.mlp(x)
            return self.mlp(x).softmax(-1)

    model = trained(Net())
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    assert not [block for block in graph.blocks if block.exact]


@dataclass
class Output:
    y: torch.Tensor


def test_results_that_nothing_can_stand_in_for():
    class Odd(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.mlp, self.wrap = Mlp(6, 8), wrap

        def forward(self, x):
            return self.wrap(self.mlp(x))

    class Net(nn.Module):
        def __init__(self, wrap, unwrap):
            super().__init__()
            self.odd, self.unwrap = Odd(wrap), unwrap

        def forward(self, x):
            return x + self.unwrap(self.odd(x))

    for wrap, unwrap in ((lambda y: {"y": y}, lambda out: out["y"]), (lambda y: [y, 3], lambda out: out[0])):
        model = trained(Net(wrap, unwrap))
        graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
        assert error(model, graph, ["odd"], TOKENS) < 1e-12
    model = trained(Net(Output, lambda out: out.y))
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    assert graph.block("odd").reason == "nothing can stand in for the Output that it returns"
    assert graph.block("odd.mlp").exact


def test_what_is_written_into_later_is_copied():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ConvNext.Block(6)
            self.stem = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            x = self.stem(x)
            y = self.block(x)
            return torch.relu_(y[:, 1:])[:, :1] + x[:, 1:2]

    model = trained(Net())
    graph = ChannelGraph.watch(model, IMAGE, rehearse=False)
    assert Plan(graph, {}, ["block"]).stand_ins()["block"] == {"pass": [0], "copy": True, "order": None}
    assert error(model, graph, ["block"], IMAGE) < 1e-12


def test_a_stand_in_lies_in_memory_as_what_it_stands_for():
    """Else a ``view`` behind it fails, or other operators run."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return (x + self.conv(x)).contiguous()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.block = nn.Linear(3, 6), Turned()
            self.mlp = Mlp(6, 8)

        def forward(self, x):
            x = self.lin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = self.block(x).view(x.shape[0], 6, -1)
            return x + self.mlp(x.transpose(1, 2)).transpose(1, 2)

    model = trained(Net())
    graph = ChannelGraph.watch(model, IMAGE, rehearse=False)
    for name in ("block", "mlp"):
        assert error(model, graph, [name], IMAGE) < 1e-12
        assert error(model, graph, [name], IMAGE.to(memory_format=torch.channels_last)) < 1e-12
        assert Replay(Plan(graph, {}, [name]), IMAGE).run(model) is None


def test_what_is_gone_tells_what_it_was_like():
    model = trained(Transformer())
    graph = ChannelGraph.watch(model, TOKENS, rehearse=False)
    small = without(model, graph, ["blocks.0", "blocks.1.mlp"])
    assert small.blocks[0].mlp.fc1.weight.shape == (32, 16)
    assert small.blocks[1].mlp.fc1.weight.dtype == torch.float64
    assert deepcopy(small).half().blocks[1].norm2.weight.dtype == torch.float16
    assert small.to("meta").blocks[0].attn.qkv.bias.device.type == "meta"
    assert not [name for name in small.state_dict() if name.startswith(("blocks.0", "blocks.1.mlp"))]


def test_macs_and_parameters_are_what_torch_counts(resnet):
    for model, graph, x, names in (
        (*resnet, IMAGE, ["layer1.0", "layer2.0.bn2", "layer2.0.downsample"]),
        (m := trained(Transformer()), ChannelGraph.watch(m, TOKENS), TOKENS, ["blocks.0", "blocks.1.mlp"]),
    ):
        for name in names:
            block, small = graph.block(name), without(model, graph, [name])
            assert block.macs == counted_macs(model, x) - counted_macs(small, x)
            count = [sum(p.numel() for p in each.parameters()) for each in (model, small)]
            assert block.params == count[0] - count[1]
            cost, plan = graph.cost(blocks=[name]), Plan(graph, {}, [name])
            assert (cost.macs, cost.params) == (plan.cost().macs, plan.cost().params)
            assert (graph.cost().macs - cost.macs, graph.cost().params - cost.params) == (block.macs, block.params)


def test_a_plan_with_channels_and_blocks(resnet):
    model, graph = resnet
    kept = {g.name: range(g.size // 2) for g in graph.groups if g.prunable and g.exact}
    plan = Plan(graph, kept, ["layer1.1", "layer1.1.bn2", "layer2.0.downsample"])
    assert plan.blocks == ("layer1.1", "layer2.0.downsample")  # what is inside another goes with it
    assert not [name for name in plan.slices() if name.startswith("layer1.1.")]
    assert all(
        (mask == 0).all() for name in ("conv1", "bn2") for mask in plan.masks(model)[f"layer1.1.{name}"].values()
    )
    assert plan.to_dict()["block layer1.1"] == {"size": 1, "kept": []}
    assert "without layer1.1" in repr(plan)
    assert Replay(plan, IMAGE).run(model) is None
    assert isinstance(model.layer1[1], BasicBlock)  # the model is as it was


def test_a_stand_in_can_be_taken_back(resnet):
    model = deepcopy(resnet[0])
    before, state = model(IMAGE), dict(model.layer1[0].__dict__)
    seen = []
    model.layer1[0].register_forward_hook(lambda *call: seen.append(call[2]))
    take_back = stand_in(model.layer1[0], {"pass": [0], "copy": False, "order": None})
    assert isinstance(model.layer1[0], Passing)
    assert not list(model.layer1[0].parameters())
    assert model.layer1[0].conv1.stride == (1, 1)
    model(IMAGE)
    assert len(seen) == 1  # hooks stay
    take_back()
    assert isinstance(model.layer1[0], BasicBlock)
    assert all(model.layer1[0].__dict__[key] is value for key, value in state.items())
    assert torch.equal(model(IMAGE), before)


def test_names_that_are_none(resnet):
    graph = resnet[1]
    with pytest.raises(KeyError, match=r"no block is called 'layer1\.7'; did you mean 'layer1\.\d'\?"):
        Plan(graph, {}, ["layer1.7"])


def test_a_block_that_the_model_does_not_run_without_is_put_back():
    """Its parent computes with a weight of it: nobody can know before it is tried."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mlp(6, 8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x) + 0 * self.blocks[1].fc2.weight.sum()
            return x

    model = trained(Net())
    graph = ChannelGraph.watch(model, TOKENS)
    before = graph.rehearsed_blocks(model, TOKENS)
    assert [block.name for block in before.blocks if not block.removable] == ["blocks.1"]
    names = ["blocks.0", "blocks.1"]
    graph, plan = settled(
        graph, model, TOKENS, lambda g: Plan(g, {}, [name for name in names if g.block(name).removable])
    )
    assert plan.blocks == ("blocks.0",)
    assert "the model does not run without it" in graph.block("blocks.1").reason


@pytest.mark.parametrize("seed", range(12))
def test_random_residual_nets(seed):
    """What is said to be exact is; and a block that turns out to pass its input on when masked is found."""
    model = trained(RandomResidual(seed), seed)
    graph = ChannelGraph.watch(model, IMAGE, rehearse=False)
    exact = [block.name for block in graph.blocks if block.exact]
    for name in exact:
        assert error(model, graph, [name], IMAGE) < 1e-12
    outer = [name for name in exact if not any(name.startswith(f"{other}.") for other in exact)]
    if outer:
        assert error(model, graph, outer, IMAGE) < 1e-12
    for i, block in enumerate(model.blocks):
        empty = deepcopy(block)
        for parameter in empty.parameters():
            parameter.data.zero_()
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        if torch.allclose(empty(x), x):
            assert f"blocks.{i}" in exact, block.kinds
