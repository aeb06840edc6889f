"""Compact equals masked, on random nets, NNI's masks and forwards that hold sizes; modules keep what was theirs."""

import copy
import logging

import numpy as np
import pytest
import torch
from nni.compression.speedup import ModelSpeedup as StockSpeedup
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup, load_compact, save_compact
from tests.random_networks import RandomCNN, trained_like

X = torch.randn(2, 3, 8, 8)


def random_plan(graph, seed):
    rng = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        if group.prunable and group.exact:
            keep = rng.random(group.size) > rng.uniform(0, 0.9)
            keep[rng.integers(group.size)] = True
            kept[group.name] = keep
    return Plan(graph, kept)


def masked_output(model, masks, x):
    """The output of ``model`` with the masks in its weights: worked out here, not by the library."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                if mask is None:  # NNI's way of listing a bias that is not there
                    continue
                getattr(model.get_submodule(module), target).mul_(mask)
        return model(x)


SEEDS = [*range(200), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(200, 1000))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks(seed):
    """Residuals, concatenations, groups, depthwise, squeeze-and-excitation, shuffles, at random ratios."""
    model = RandomCNN(seed).double()
    x = X.double()
    plan = random_plan(ChannelGraph.watch(model, x), seed)
    masks = plan.masks(model)
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model().eval()
    assert (compact(x) - expected).abs().max() <= 1e-11 * expected.abs().max().clamp(min=1e-3)
    assert speedup.report.relative_error < 1e-11
    assert not speedup.report.put_back
    assert not speedup.report.inexact
    assert speedup.plan.counts == plan.counts
    assert speedup.report.macs_after == plan.cost().macs
    assert speedup.report.params_after == sum(p.numel() for p in compact.parameters())


@pytest.mark.parametrize("seed", range(40))
def test_masks_of_producers_only(seed):
    """As NNI's pruners make them: norms unmasked, some biases unmasked. What is left behind is folded, exactly here."""
    model = RandomCNN(seed, padded=False).double()
    x = X.double()
    graph = ChannelGraph.watch(model, x)
    plan = random_plan(graph, seed)
    rng = np.random.default_rng(seed)
    masks, parameters = {}, dict(model.named_parameters())
    for name, units in plan.kept.items():
        group = graph.group(name)
        gone = np.setdiff1d(np.arange(group.size), units)
        for member in group.producers:
            if member.parameter != "weight" and rng.random() < 0.5:
                continue
            mask = masks.setdefault(member.module, {}).setdefault(
                member.parameter, torch.ones_like(parameters[member.name])
            )
            mask.index_fill_(member.dim, torch.as_tensor(member.indices[gone].ravel()), 0)
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model().eval()
    assert (compact(x) - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1e-3)
    assert not speedup.report.put_back
    assert speedup.report.macs_after < speedup.report.macs_before


class Small(nn.Module):
    def __init__(self, padding=0):
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn = nn.Conv2d(8, 8, 3, padding=padding, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        trained_like(self)

    def forward(self, x):
        x = F.relu(self.an(self.a(x)))
        return self.fc(F.relu(self.bn(self.b(x))).mean((2, 3)))


def nni_pruner(name, model):
    from nni.compression import pruning

    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    return getattr(pruning, name)(model, config)


@pytest.mark.parametrize("name", ["L1NormPruner", "L2NormPruner", "FPGMPruner", "LevelPruner"])
@pytest.mark.parametrize("padding", [0, 1])
def test_masks_of_nnis_pruners(name, padding):
    model = Small(padding)
    pruner = nni_pruner(name, model)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    expected = masked_output(model, masks, X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model().eval()
    error = (compact(X) - expected).abs().max() / expected.abs().max()
    if name == "LevelPruner":
        assert speedup.report.macs_after <= speedup.report.macs_before
    else:
        assert (model.a.out_channels, model.b.in_channels, model.b.out_channels, model.fc.in_features) == (4, 4, 4, 4)
    if padding and name != "LevelPruner":
        assert speedup.report.inexact == ["b: zero padding makes the border differ"]
        assert error < 0.5
    else:
        assert not speedup.report.inexact
        assert error < 1e-5
    assert speedup.report.max_error == pytest.approx(0, abs=1e-5) or speedup.report.inexact


def test_stock_speedup_drops_the_constant_that_ours_folds():
    """NNI's own result is off from the masked model by about the output's size; ours is not."""
    errors = {}
    for kind in (StockSpeedup, ModelSpeedup):
        torch.manual_seed(0)
        model = Small()
        pruner = nni_pruner("L1NormPruner", model)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        expected = masked_output(model, masks, X)
        compact = kind(model, X, masks).speedup_model().eval()
        errors[kind] = ((compact(X) - expected).abs().max() / expected.abs().max()).item()
    assert errors[ModelSpeedup] < 1e-5
    assert errors[StockSpeedup] > 1e-2


def test_a_masked_norm_removes_its_channels():
    """Slim pruning masks the norm, not the convolution."""
    model = Small()
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 1])
    masks = {"bn": {"weight": mask, "bias": mask}}
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model().eval()
    assert model.b.out_channels == 5
    assert torch.allclose(compact(X), expected, atol=1e-6)


def test_a_unit_that_nobody_reads_goes():
    model = Small()
    mask = torch.ones(4, 8)
    mask[:, [1, 5]] = 0
    masks = {"fc": {"weight": mask}}
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model().eval()
    assert (model.b.out_channels, model.fc.in_features) == (6, 6)
    assert torch.allclose(compact(X), expected, atol=1e-6)


def test_a_residual_stays_while_one_producer_is_alive():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(x))

    keep = torch.tensor([True, True, False, False, True, True])
    masks = {
        name: {"weight": torch.ones(6, width, 1, 1), "bias": torch.ones(6)} for name, width in [("a", 3), ("b", 6)]
    }
    masks["a"]["weight"][~keep], masks["a"]["bias"][~keep] = 0, 0
    model = Residual()
    ModelSpeedup(model, X, masks).speedup_model()
    assert model.a.out_channels == 6
    masks["b"]["weight"][2], masks["b"]["bias"][2] = 0, 0
    model = Residual()
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model()
    assert model.a.out_channels == 5
    assert torch.allclose(compact(X), expected, atol=1e-6)


def test_a_layer_is_never_emptied():
    model = Small()
    masks = {"a": {"weight": torch.zeros(8, 3, 3, 3), "bias": torch.zeros(8)}}
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model().eval()
    assert model.a.out_channels == 1
    assert torch.allclose(compact(X), expected, atol=1e-6)


def half(model, x):
    graph = ChannelGraph.watch(model, x)
    return Plan(graph, {g.name: range(g.size // 2) for g in graph.groups if g.prunable and g.exact})


def test_modules_and_parameters_keep_what_was_theirs():
    model = Small().to(memory_format=torch.channels_last).half().train()
    model.an.eval()
    model.b.weight.requires_grad_(False)
    calls = []
    model.b.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    model.a.weight.register_hook(lambda grad: None)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    identities = {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = X.half()
    ModelSpeedup(model, x, half(model, x).masks(model)).speedup_model()
    assert identities == {name: id(p) for name, p in model.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert (model.training, model.a.training, model.an.training) == (True, True, False)
    assert not model.b.weight.requires_grad
    assert model.a.weight.grad.shape == model.a.weight.shape == (4, 3, 3, 3)
    assert model.a.weight._backward_hooks
    calls.clear()
    model.eval()(x)
    assert calls == [4]
    assert optimizer.param_groups[0]["params"][0] is model.a.weight
    assert (model.an.num_features, model.fc.in_features, model.b.out_channels) == (4, 4, 4)


def test_the_compact_model_trains_and_takes_other_sizes():
    model = Small()
    ModelSpeedup(model, X, half(model, X).masks(model)).speedup_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 4, (16,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert copy.deepcopy(model).eval()(X).shape == (2, 4)


class Stale(nn.Module):
    """Holds sizes: in an attribute, in a submodule's attribute, and one written into the forward."""

    def __init__(self, written: bool):
        super().__init__()
        self.width = 8
        self.written = written
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.a(x)).view(-1, self.width)
        x = F.relu(self.b(x))
        return self.c(x.view(-1, 6) if self.written else x)


def test_a_stale_attribute_is_mended():
    model = Stale(written=False)
    x = torch.randn(4, 3)
    plan = half(model, x)
    expected = masked_output(model, plan.masks(model), x)
    speedup = ModelSpeedup(model, x, plan.masks(model))
    compact = speedup.speedup_model()
    assert (model.width, model.a.out_features, model.b.out_features) == (4, 4, 3)
    assert not speedup.report.put_back
    assert torch.allclose(compact(x), expected, atol=1e-6)


def test_a_size_written_into_the_forward_puts_its_group_back_and_goes_on():
    model = Stale(written=True)
    x = torch.randn(4, 3)
    masks = half(model, x).masks(model)
    masks["b"] = {"weight": torch.ones(6, 8), "bias": torch.tensor([1.0, 1, 1, 0, 0, 0])}
    masks["b"]["weight"][3:] = 0
    expected = masked_output(model, masks, x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert (model.a.out_features, model.b.out_features) == (4, 6)
    assert len(speedup.report.put_back) == 1
    assert speedup.report.put_back[0].startswith("b: 3 of 6 units: its forward holds a fixed size")
    assert "aten.view" in speedup.report.put_back[0]
    assert torch.allclose(compact(x), expected, atol=1e-6)


class Liar(nn.Module):
    """Right shapes, wrong numbers: it divides by the width that it happens to have."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        for layer in (self.a, self.b):
            nn.init.ones_(layer.bias)  # where every unit of a layer is below zero, nothing is wrong

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x / torch.full_like(x, x.shape[1]))
        return self.c(F.relu(x))


def test_right_shapes_that_hide_a_wrong_model_are_found_and_put_back():
    model = Liar()
    x = torch.randn(4, 3)
    plan = half(model, x)
    expected = masked_output(model, plan.masks(model), x)
    speedup = ModelSpeedup(model, x, plan.masks(model))
    compact = speedup.speedup_model()
    assert (model.a.out_features, model.b.out_features) == (8, 3)
    assert speedup.report.put_back == ["a: the compact model's output differed from the masked model's"]
    assert torch.allclose(compact(x), expected, atol=1e-6)
    assert speedup.report.relative_error < 1e-6


def test_a_head_initialised_to_zero_hides_nothing():
    model = Liar()
    nn.init.zeros_(model.c.weight)
    x = torch.randn(4, 3)
    speedup = ModelSpeedup(model, x, half(model, x).masks(model))
    speedup.speedup_model()
    assert len(speedup.report.put_back) == 1
    assert not model.c.weight.any()
    assert model.c.weight.shape == (2, 3)


def test_groups_under_a_layer_norm_stay_unless_asked_for():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(3, 4)
    model = make()
    graph = ChannelGraph.watch(model, x)
    assert (graph.group("0").exact, graph.group("0").prunable) == (False, True)
    masks = Plan(graph, {"0": range(4)}).masks(model)
    ModelSpeedup(model, x, masks).speedup_model()
    assert model[0].out_features == 8
    model = make()
    speedup = ModelSpeedup(model, x, masks, exact_only=False)
    compact = speedup.speedup_model()
    assert (model[0].out_features, model[1].normalized_shape, model[3].in_features) == (4, (4,), 4)
    assert compact(x).shape == (3, 2)
    assert speedup.report.inexact


def test_two_speedups_in_a_row():
    model = Small()
    for width in (4, 2):
        ModelSpeedup(model, X, half(model, X).masks(model)).speedup_model()
        assert model.a.out_channels == model.fc.in_features == width


def test_customized_replacers_come_first():
    from nni.compression.speedup.replacement import replace_linear
    from nni.compression.speedup.replacer import DefaultReplacer, Replacer

    seen = []

    class Note(Replacer):
        def replace_modules(self, speedup):
            seen.extend((node.target, tuple(info.output_masks.shape)) for node, info in speedup.node_infos.items()
                        if node.op == "call_module")  # fmt: skip

    def linear(module, masks):
        seen.append("linear")
        return replace_linear(module, masks)

    model = Small()
    fc = model.fc
    masks = half(model, X).masks(model)
    expected = masked_output(model, masks, X)
    given = [Note(), DefaultReplacer({"Linear": linear})]
    compact = ModelSpeedup(model, X, masks, customized_replacers=given).speedup_model().eval()
    assert seen == [("a", (1, 8, 8, 8)), ("an", (1, 8, 8, 8)), ("b", (1, 8, 6, 6)), ("bn", (1, 8, 6, 6)),
                    ("fc", (1, 4)), "linear"]  # fmt: skip
    assert len(given) == 2
    assert model.fc is not fc
    assert model.fc.in_features == 4
    assert torch.allclose(compact(X), expected, atol=1e-6)


def test_a_graph_module_takes_nnis_own_path():
    from nni.common.concrete_trace_utils import concrete_trace

    model = Small().eval()
    masks = half(model, X).masks(model)
    expected = masked_output(model, masks, X)
    speedup = ModelSpeedup(model, X, masks, graph_module=concrete_trace(model, {"x": X}))
    compact = speedup.speedup_model().eval()
    assert speedup.node_infos
    assert model.a.out_channels == 4
    assert torch.allclose(compact(X), expected, atol=1e-5)


def test_masks_from_a_file(tmp_path):
    from collections import defaultdict

    from safetensors.torch import save_file

    model = Small()
    masks = half(model, X).masks(model)
    torch.save(defaultdict(dict, masks), tmp_path / "masks.pth")
    save_file(
        {f"{m}.{t}": mask for m, targets in masks.items() for t, mask in targets.items()}, tmp_path / "m.safetensors"
    )
    for path in (tmp_path / "masks.pth", str(tmp_path / "m.safetensors")):
        model = Small()
        ModelSpeedup(model, X, path).speedup_model()
        assert model.a.out_channels == 4


def test_wrong_masks_are_refused_in_one_line_and_nothing_is_lost(tmp_path):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    (tmp_path / "foreign.pth").write_bytes(b"not a file of masks")
    (tmp_path / "foreign.safetensors").write_bytes(b"not a file of masks")
    torch.save([1, 2], tmp_path / "list.pth")
    for masks, error, words in [
        ({"aa": {"weight": torch.ones(8, 3, 3, 3)}}, ValueError, "no module 'aa'; did you mean 'a'"),
        (
            {"a": {"weight": torch.ones(8, 3, 3)}},
            ValueError,
            r"a.weight has shape \(8, 3, 3, 3\), its mask \(8, 3, 3\)",
        ),
        ({"a": {"wait": torch.ones(8)}}, ValueError, "a.wait is not a parameter"),
        ({"a": {"_output_0": torch.zeros(3)}}, ValueError, r"a._output_0 has shape .*, its mask \(3,\)"),
        (tmp_path / "none.pth", FileNotFoundError, "no such mask file"),
        (None, ValueError, "the path of a file is needed, not a NoneType"),
        ({"a": torch.ones(8)}, ValueError, "'a' needs {target: mask}, not a mask"),
        ({"a": {"bias": [1, 0]}}, ValueError, "a.bias has a list for a mask"),
        (tmp_path / "foreign.safetensors", ValueError, "not a mask file"),
        (tmp_path / "foreign.pth", ValueError, "not a mask file"),
        (tmp_path / "list.pth", ValueError, "not a mask file"),
    ]:
        with pytest.raises(error, match=words) as caught:
            ModelSpeedup(model, X, masks).speedup_model()
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_report_is_plain_data_and_readable(caplog):
    import json

    model = Small()
    with caplog.at_level(logging.INFO):
        speedup = ModelSpeedup(model, X, half(model, X).masks(model))
        speedup.speedup_model()
    data = json.loads(json.dumps(speedup.report.to_dict()))
    assert data["removed"]["a"] == [4, 8]
    assert data["macs_after"] < data["macs_before"]
    assert set(data["seconds"]) == {"watch", "masks", "replay", "removal", "proof"}
    assert "largest error against the masked model" in str(speedup.report)
    assert "MACs" in caplog.text


def test_memory_is_flat_over_many_speedups():
    import gc
    import tracemalloc

    def once():
        model = Small()
        ModelSpeedup(model, X, half(model, X).masks(model)).speedup_model()

    tracemalloc.start()
    for _ in range(12):  # what is kept once, by whatever is called, is there by then
        once()
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        once()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 40_000


class Noisy(nn.Module):
    """Draws random numbers in eval mode too, as many as it is wide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        return self.b(x + torch.randn_like(x))


def test_a_random_forward_is_not_blamed_on_its_groups():
    model, x = Noisy(), torch.randn(4, 3)
    speedup = ModelSpeedup(model, x, half(model, x).masks(model))
    speedup.speedup_model()
    assert model.a.out_features == 4
    assert not speedup.report.put_back
    assert speedup.report.max_error is None
    assert speedup.report.inexact == ["not proved: the forward draws random numbers, and other ones when it is smaller"]


def test_masked_units_that_stay_are_named_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    masks = {"0": {"weight": torch.ones(8, 4)}, "2": {"weight": torch.ones(6, 8)}, "4": {"weight": torch.ones(2, 6)}}
    masks["0"]["weight"][:3], masks["2"]["weight"][:2], masks["4"]["weight"][0] = 0, 0, 0
    speedup = ModelSpeedup(model, torch.randn(3, 4), masks)
    speedup.speedup_model()
    assert (model[0].out_features, model[2].out_features) == (8, 4)
    assert [line.split(":")[0] for line in speedup.report.stayed] == ["0", "4"]
    assert "0: 3 of 8 units: normalised across channels" in speedup.report.stayed[0]
    assert "4: 1 of 2 units: the model's output" in speedup.report.stayed[1]
    assert "masked, but stays: 0: 3 of 8 units" in str(speedup.report)


class Seam(nn.Module):
    """Two maps side by side: a masked channel is one constant on the left and another on the right."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.c(F.relu(torch.cat([self.a(x), self.b(x)], dim=3)))


def test_a_masked_unit_that_is_no_one_constant_stays_and_the_others_go():
    model = Seam()
    with torch.no_grad():
        model.a.bias.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6]))
        model.b.bias.copy_(torch.tensor([4.0, 2, 9, 7, 5, 8]))
    mask = torch.ones(6, 3, 1, 1)
    mask[:3] = 0
    masks = {"a": {"weight": mask}, "b": {"weight": mask}}
    expected = masked_output(model, masks, X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model()
    assert torch.allclose(compact(X), expected, atol=1e-5)
    assert model.a.out_channels == 5  # unit 1 is 2 on both sides; units 0 and 2 differ
    assert [line[:14] for line in speedup.report.stayed] == ["a: 2 of 6 unit"]
    assert not speedup.report.inexact


def test_a_program_of_torch_export_is_sped_up(tmp_path):
    """It has neither training nor eval mode, and says so by an error."""

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        return torch.export.export(net, (torch.randn(2, 3, 8, 8),)).module()

    model, x = build(), torch.randn(2, 3, 8, 8)
    graph = ChannelGraph.watch(model, x)
    (group,) = [g for g in graph.groups if g.prunable]
    speedup = ModelSpeedup(model, x, Plan(graph, {group.name: [1, 2, 6]}).masks(model))
    compact = speedup.speedup_model()
    assert speedup.report.relative_error < 1e-5
    assert sum(p.numel() for p in compact.parameters()) == 3 * 27 + 3 + 6 + 4 * 27 + 4
    save_compact(compact, tmp_path / "compact.safetensors")
    assert torch.equal(load_compact(tmp_path / "compact.safetensors", build)(x), compact(x))
