"""Whole blocks go in a speedup: where masks leave them without effect, proved, saved, and trained on."""

import io
import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.stand_in import Nothing, Passing
from nni_plugins.speedup import ModelSpeedup, load_compact, save_compact
from nni_plugins.speedup.optimizer import fit_optimizer
from tests.block_nets import (
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


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out["logits"] if isinstance(out, dict) else out


def masked(model, masks):
    copy = deepcopy(model)
    for module, targets in masks.items():
        for target, mask in targets.items():
            getattr(copy.get_submodule(module), target).data.mul_(mask)
    return copy


def sped_up(model, inputs, masks, others=(), **options):
    """Speed a copy up and hold it against the masked model on the dummy input and on ``others``; return the speedup."""
    speedup = ModelSpeedup(deepcopy(model), inputs, masks, **options)
    compact, whole = speedup.speedup_model(), masked(model, masks)
    for each in (inputs, *others):
        expected = run(whole, each)
        assert (run(compact, each) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert speedup.report.relative_error < 1e-9
    assert speedup.report.params_after == sum(p.numel() for p in compact.parameters())
    return speedup


def masks_of(model, inputs, blocks, share=1.0):
    """Masks of blocks, and of a share of each exact group's channels."""
    graph = ChannelGraph.watch(model, inputs)
    kept = {g.name: range(max(1, int(g.size * share))) for g in graph.groups if g.prunable and g.exact}
    return Plan(graph, kept, blocks).masks(model)


def zeros(model, *names):
    """Masks of zeros for modules, and all below them."""
    masks = {}
    for name in names:
        for parameter, tensor in model.get_submodule(name).named_parameters():
            module, _, target = f"{name}.{parameter}".rpartition(".")
            masks.setdefault(module, {})[target] = torch.zeros_like(tensor)
    return masks


CASES = {
    "resnet": (ResNet, IMAGE, ["layer1.0", "layer2.0.bn2"], ["layer1.0", "layer2.0.bn2"]),
    "a stage": (ResNet, IMAGE, ["layer1"], ["layer1.0", "layer1.1"]),
    "a shortcut": (ResNet, IMAGE, ["layer2.0.downsample"], ["layer2.0.downsample"]),
    "transformer": (Transformer, TOKENS, ["blocks.0", "blocks.1.attn"], ["blocks.0", "blocks.1.attn"]),
    "both branches": (Transformer, TOKENS, ["blocks.1.attn", "blocks.1.mlp"], ["blocks.1"]),
    "scaled": (lambda: Transformer(scale=True), TOKENS, ["blocks.2.mlp"], ["blocks.2.mlp"]),
    "convnext": (ConvNext, IMAGE, ["stages.1"], ["stages.1"]),
    "keywords": (
        KeywordModel,
        {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)},
        ["layers.0", "layers.1.self_attn"],
        ["layers.0", "layers.1.self_attn"],
    ),
    "experts": (
        lambda: Transformer(MoEBlock, depth=2),
        TOKENS,
        ["blocks.0.moe.experts.2", "blocks.1.moe.experts.0", "blocks.1.moe.experts.3"],
        ["blocks.0.moe.experts.2", "blocks.1.moe.experts.0", "blocks.1.moe.experts.3"],
    ),
}


def parts(name):
    make, inputs, blocks, gone = CASES[name]
    return trained(make()), inputs, blocks, gone


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_blocks_go_and_nothing_changes(name, share):
    """With share 0.5, half of the channels go with them."""
    model, inputs, blocks, gone = parts(name)
    speedup = sped_up(model, inputs, masks_of(model, inputs, blocks, share))
    report = speedup.report
    assert sorted(report.removed_blocks) == sorted(gone)
    assert report.to_dict()["removed_blocks"] == report.removed_blocks
    assert f"removed as a whole: {', '.join(report.removed_blocks)}" in str(report)
    assert not report.stayed
    assert not report.put_back
    assert not report.inexact
    assert bool(report.removed) == (share < 1)
    if share == 1:
        graph = ChannelGraph.watch(model, inputs)
        assert report.macs_before - report.macs_after == graph.cost().macs - graph.cost(blocks=blocks).macs
        assert report.params_after == graph.cost(blocks=blocks).params
    else:
        assert report.macs_after < 0.8 * report.macs_before


def test_the_last_layer_of_a_branch_is_enough():
    model = trained(Transformer())
    masks = zeros(model, "blocks.0.mlp.fc2", "blocks.1.attn.proj")
    speedup = sped_up(model, TOKENS, masks)
    assert speedup.report.removed_blocks == ["blocks.0.mlp", "blocks.1.attn"]
    compact = speedup.bound_model
    assert isinstance(compact.blocks[0].mlp, Nothing)
    assert isinstance(compact.blocks[0].norm2, Nothing)  # nobody needs it


def test_a_bias_that_is_not_masked_stays():
    """Then the branch is no zero, but a constant: the layers in it shrink to a unit, and the constant is kept."""
    model = trained(Transformer())
    masks = {"blocks.0.mlp.fc2": {"weight": torch.zeros(16, 32, dtype=torch.float64)}}
    speedup = sped_up(model, TOKENS, masks)
    assert speedup.report.removed_blocks == []
    assert isinstance(speedup.bound_model.blocks[0].mlp, Mlp)


def test_a_branch_may_be_dead_without_a_parameter_that_is_masked_whole():
    """What the first layer still gives, the second does not read."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mlp = nn.Linear(6, 8), Mlp(8, 10)
            self.mlp.fc2.bias = None

        def forward(self, x):
            x = self.embed(x)
            return x + self.mlp(x)

    model = trained(Net())
    first, bias, second = torch.ones(10, 8), torch.ones(10), torch.ones(8, 10)
    first[:4], bias[:4], second[:, 4:] = 0, 0, 0
    masks = {"mlp.fc1": {"weight": first, "bias": bias}, "mlp.fc2": {"weight": second}}
    speedup = sped_up(model, TOKENS, masks)
    assert speedup.report.removed_blocks == ["mlp"]


def test_masks_of_everything_leave_a_model():
    model = trained(ResNet())
    speedup = sped_up(model, IMAGE, zeros(model, "layer1.0", "layer1.1", "layer2"))
    assert not [name for name in speedup.report.removed_blocks if name.startswith("layer2.0")]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("part", ["self_attn", "linear2"])
def test_torchs_encoder_with_and_without_its_fast_path(norm_first, part):
    """A layer without one of its parts cannot take torch's fused path; the others still do."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = trained(nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    blocks = [f"layers.0.{part}"]
    masks = masks_of(model, x, blocks)
    compact = sped_up(model, x, masks).bound_model
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    whole = masked(model, masks)
    with torch.no_grad():  # padding makes torch's own encoder take nested tensors
        out, expected = (m(x, src_key_padding_mask=padding) for m in (compact, whole))
    assert torch.allclose(out[~padding], expected[~padding], atol=1e-12)
    compact.train()
    compact(x).sum().backward()


def test_a_first_encoder_layer_goes():
    """The encoder reads ``layers[0].self_attn.batch_first`` whatever layer 0 is."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = trained(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert sped_up(model, x, zeros(model, "layers.0")).report.removed_blocks == ["layers.0"]


def test_an_expert_that_got_no_token():
    model = trained(Transformer(MoEBlock, depth=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    x, many = TOKENS[:1, :1], torch.randn(4, 40, 6, dtype=torch.float64)
    masks = zeros(model, *(f"blocks.0.moe.experts.{i}" for i in (0, 1, 2)))
    speedup = sped_up(model, x, masks, [many])
    assert sorted(speedup.report.removed_blocks) == [f"blocks.0.moe.experts.{i}" for i in (0, 1, 2)]
    assert speedup.report.params_before - speedup.report.params_after == 3 * sum(
        p.numel() for p in model.blocks[0].moe.experts[0].parameters()
    )


def test_a_block_that_is_not_exact_goes_where_it_is_asked_for():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = trained(nn.TransformerEncoder(layer, 3))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    masks = zeros(model, "layers.1")
    exact = sped_up(model, x, masks).report
    assert "layers.1" not in exact.removed_blocks
    speedup = ModelSpeedup(deepcopy(model), x, masks, exact_only=False)
    compact = speedup.speedup_model()
    assert speedup.report.removed_blocks == ["layers.1"]
    assert "block layers.1: its input is changed on the way, not added to" in speedup.report.inexact
    shorter = deepcopy(model)
    del shorter.layers[1]
    assert torch.allclose(compact(x), shorter(x), atol=1e-12)


@pytest.mark.parametrize(
    ("times", "why"),
    [
        (lambda x, count: x * torch.full_like(x, count), "the compact model's output differed from the masked model's"),
        (lambda x, count: x * count, "the model does not run without it (aten.mul in the model: it is given 1, not 2"),
    ],
)
def test_a_wrong_block_is_put_back_and_named(times, why):
    """Right shapes hide it: the forward counts how often a block was called."""

    class Counted(Mlp):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Counted(6, 8), Mlp(6, 8), Mlp(6, 8)])

        def forward(self, x):
            self.blocks[0].calls = 0
            for block in self.blocks:
                x = x + block(x)
            return times(x, 1 + self.blocks[0].calls)

    model = trained(Net())
    speedup = sped_up(model, TOKENS, zeros(model, "blocks.0", "blocks.1"))
    assert speedup.report.removed_blocks == ["blocks.1"]
    assert any(line.startswith(f"block blocks.0: {why}") for line in speedup.report.put_back)
    assert isinstance(speedup.bound_model.blocks[0], Counted)


def test_a_block_that_does_not_run_is_put_back_and_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mlp(6, 8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x) + 0 * self.blocks[1].fc2.weight.sum()
            return x

    model = trained(Net())
    speedup = sped_up(model, TOKENS, zeros(model, "blocks.0", "blocks.1"))
    assert speedup.report.removed_blocks == ["blocks.0"]
    assert len(speedup.report.put_back) == 1


@pytest.mark.parametrize("name", CASES)
def test_it_is_saved_copied_pickled_and_trained(name, tmp_path):
    model, inputs, blocks, _ = parts(name)
    masks = masks_of(model, inputs, blocks, 0.5)
    compact = sped_up(model, inputs, masks).bound_model
    expected = run(compact, inputs)
    save_compact(compact, tmp_path / "m.safetensors")
    loaded = load_compact(tmp_path / "m.safetensors", lambda: CASES[name][0]().double())
    assert torch.equal(run(loaded, inputs), expected)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in compact.named_parameters()}
    assert torch.equal(run(deepcopy(compact), inputs), expected)
    file = io.BytesIO()
    torch.save(compact, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), inputs), expected)
    compact.train()
    optimizer = torch.optim.SGD(compact.parameters(), 0.1)
    out = compact(**inputs) if isinstance(inputs, dict) else compact(inputs)
    (out["logits"] if isinstance(out, dict) else out).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in compact.parameters())
    assert (run(compact.eval(), inputs) - expected).abs().max() > 0


@pytest.mark.parametrize("name", ["resnet", "both branches", "keywords"])
def test_it_is_exported(name):
    model, inputs, blocks, _ = parts(name)
    compact = sped_up(model, inputs, masks_of(model, inputs, blocks, 0.5)).bound_model
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    exported = torch.export.export(compact, args, kwargs).module()
    assert torch.allclose(run(exported, inputs), run(compact, inputs), atol=1e-12)


def test_a_fresh_process_without_nni_loads_it(tmp_path):
    model, inputs, blocks, _ = parts("resnet")
    compact = sped_up(model, inputs, masks_of(model, inputs, blocks, 0.5)).bound_model
    save_compact(compact, tmp_path / "m.safetensors")
    code = f"""
import json, sys, torch
from nni_plugins.speedup import load_compact
from tests.block_nets import ResNet
model = load_compact({str(tmp_path / "m.safetensors")!r}, lambda: ResNet().double())
out = model(torch.ones(1, 3, 12, 20, dtype=torch.float64))
print(json.dumps([out.tolist(), sorted(m for m in sys.modules if m.split(".")[0] in ("nni", "scipy"))]))
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    values, heavy = json.loads(out.stdout.splitlines()[-1])
    expected = run(compact, torch.ones(1, 3, 12, 20, dtype=torch.float64))
    assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, atol=1e-12)
    assert heavy == []


def test_a_second_speedup_prunes_around_the_stand_ins(tmp_path):
    """Zeros of a fixed width follow the channels that go later; both steps are in one file."""
    model, inputs, blocks, _ = parts("resnet")
    compact = sped_up(model, inputs, masks_of(model, inputs, blocks)).bound_model
    assert isinstance(compact.layer2[0].bn2, Nothing)
    again = sped_up(compact, inputs, masks_of(compact, inputs, ["layer1.1"], 0.5), [IMAGE[:, :, :13, :9]])
    assert "layer2.0.downsample.0" in again.report.removed or any(k.startswith("layer2") for k in again.report.removed)
    assert again.report.removed_blocks == ["layer1.1"]
    save_compact(again.bound_model, tmp_path / "m.safetensors")
    loaded = load_compact(tmp_path / "m.safetensors", lambda: ResNet().double())
    assert torch.equal(run(loaded, inputs), run(again.bound_model, inputs))
    assert isinstance(loaded.layer1[0], Passing)
    assert isinstance(loaded.layer1[1], Passing)


def test_an_optimizer_from_before_goes_on():
    model, inputs, blocks, _ = parts("resnet")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()
    model(inputs).square().mean().backward()
    optimizer.step()
    model.eval()
    gone = model.layer1[0].conv1.weight
    gradient = gone.grad
    speedup = ModelSpeedup(model, inputs, masks_of(model, inputs, blocks, 0.5))
    compact = speedup.speedup_model()
    assert gone.grad is gradient
    assert all(gone is not parameter for parameter in compact.parameters())
    fit_optimizer(optimizer, speedup)
    optimizer.zero_grad()
    compact.train()(inputs).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in compact.parameters())


def test_the_layer_that_a_cache_is_asked_by():
    """transformers' caches of keys and values ask the first layer how long they are."""
    model = trained(KeywordModel())
    for number, layer in enumerate(model.layers):
        layer.self_attn.layer_idx = number
    inputs = CASES["keywords"][1]
    for name, first in (("layers.0", True), ("layers.0.self_attn", True), ("layers.1", False), ("layers.0.mlp", False)):
        lines = sped_up(model, inputs, masks_of(model, inputs, [name])).report.inexact
        assert (
            lines
            == [
                f"block {name}: a cache of keys and values asks layer 0 how long it is; before generating with one, number "
                "the layer_idx of the layers that are left anew"
            ]
            * first
        )


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    model, inputs, blocks, _ = parts("resnet")
    before, kinds = run(model, inputs), [type(m) for m in model.modules()]
    masks = masks_of(model, inputs, blocks, 0.5)
    monkeypatch.setattr(
        "nni_plugins.speedup.model_speedup.fold.apply", lambda *given: (_ for _ in ()).throw(RuntimeError("no"))
    )
    with pytest.raises(RuntimeError, match="no"):
        ModelSpeedup(model, inputs, masks).speedup_model()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("seed", range(10))
def test_random_residual_nets(seed):
    """Random blocks are masked, and random channels of the others: what can go goes, and nothing changes."""
    model = trained(RandomResidual(seed), seed)
    generator = torch.Generator().manual_seed(seed)
    graph = ChannelGraph.watch(model, IMAGE)
    exact = [block.name for block in graph.blocks if block.exact]
    chosen = [name for name in exact if torch.rand((), generator=generator) < 0.5]
    kept = {}
    for group in graph.groups:
        if group.prunable and group.exact:
            keep = torch.rand(group.size, generator=generator) < 0.7
            keep[0] = True
            kept[group.name] = keep.numpy()
    speedup = sped_up(model, IMAGE, Plan(graph, kept, chosen).masks(model))
    gone = speedup.report.removed_blocks
    for name in chosen:
        assert any(name == other or name.startswith(f"{other}.") for other in gone), (name, gone)
