import copy

import pytest
import torch
from torch import nn

from nni_plugins.pruners import BudgetError, MagnitudePruner, PruningError
from nni_plugins.pruners.patterns import Pattern, input_layout
from nni_plugins.pruners.weight_gradient import GradientWeightPruner
from nni_plugins.pruners.weight_magnitude import MagnitudeWeightPruner
from nni_plugins.speedup import ModelSpeedup

from .nets import X, make
from .resuming import assert_resumes
from .trainers import lightning, transformers

CONV = ["Conv2d"]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


def densities(masks):
    return {name: float(targets["weight"].mean()) for name, targets in masks.items()}


def test_the_smallest_weights_of_each_layer_go():
    net = make("plain")
    weight = net.conv2.weight.detach().clone()
    model, masks = MagnitudeWeightPruner(net, [{"op_types": CONV, "sparse_ratio": 0.75}]).compress()
    kept = masks["conv2"]["weight"] == 1
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert densities(masks) == pytest.approx(dict.fromkeys(["conv1", "conv2", "conv3"], 0.25))
    assert torch.equal(model.conv2._nni_wrapper.weight, weight)  # the weight itself stays, the product is masked
    model(X)
    assert torch.equal(model.conv2.weight, weight * kept)


def test_it_agrees_with_nnis_level_pruner():
    from nni.compression.pruning import LevelPruner

    config = [{"op_types": [*CONV, "Linear"], "sparse_ratio": 0.5}]
    ours = MagnitudeWeightPruner(make("residual"), config).compress()[1]
    theirs = LevelPruner(make("residual"), config).compress()[1]
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name]["weight"], theirs[name]["weight"]) for name in ours)


def test_global_scope_ranks_all_layers_together():
    net = make("plain")
    config = [{"op_types": CONV, "sparse_ratio": 0.8}]
    pruner = MagnitudeWeightPruner(net, config, scope="global")
    weights = {name: p.detach().clone() for name, p in pruner.parameters.items()}
    _, masks = pruner.compress()
    kept = torch.cat([weights[f"{n}.weight"][t["weight"] == 1].abs() for n, t in masks.items()])
    gone = torch.cat([weights[f"{n}.weight"][t["weight"] == 0].abs() for n, t in masks.items()])
    assert kept.min() >= gone.max()
    assert len(gone) == round(0.8 * (len(gone) + len(kept)))
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_erk_gives_thin_layers_more():
    net = make("plain")
    _, masks = MagnitudeWeightPruner(net, [{"op_types": CONV, "sparse_ratio": 0.9}], density="erk").compress()
    found = densities(masks)
    assert found["conv1"] > found["conv2"] > found["conv3"]
    total = sum(t["weight"].sum() for t in masks.values()) / sum(t["weight"].numel() for t in masks.values())
    assert total == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.Conv1d(8, 8, 3), (2, 8, 5)), (nn.Conv3d(4, 4, 2), (1, 4, 4, 4, 4)), (nn.ConvTranspose2d(8, 8, 2), (1, 8, 3, 3)),
     (nn.Linear(8, 8), (2, 8)), (nn.Embedding(10, 8), None), (nn.LSTM(8, 8), (3, 2, 8)), (nn.Bilinear(8, 8, 4), None),
     (nn.MultiheadAttention(8, 2), None)],
)  # fmt: skip
def test_any_module_with_a_weight_can_be_selected(module, x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(module)

        def forward(self, *inputs):
            out = self.layer(*inputs)
            return out[0] if isinstance(out, tuple) else out

    net = Net()
    inputs = {"Embedding": (torch.arange(4),), "Bilinear": (torch.rand(2, 8), torch.rand(2, 8)),
              "MultiheadAttention": (torch.rand(3, 2, 8),) * 3}.get(type(module).__name__) or (torch.rand(x),)  # fmt: skip
    pruner = MagnitudeWeightPruner(net, [{"op_types": [type(module).__name__], "sparse_ratio": 0.5}])
    model, masks = pruner.compress()
    masked = model(*inputs)
    pruner.unwrap_model()
    assert pruner.sparsity == 0.5
    with torch.no_grad():
        for name, mask in masks["layer"].items():
            getattr(net.layer, name).mul_(mask)
    torch.testing.assert_close(net(*inputs), masked)


def test_entries_exclusions_and_target_names():
    net = make("plain")
    config = [
        {"op_names_re": ["conv.*"], "exclude_op_names": ["conv3"], "sparse_ratio": 0.5},
        {"op_types": ["Linear"], "target_names": ["weight", "bias"],
         "target_settings": {"weight": {"sparse_ratio": 0.25}, "bias": {"sparse_ratio": 0.5}}},
    ]  # fmt: skip
    _, masks = MagnitudeWeightPruner(net, config).compress()
    assert densities(masks) == pytest.approx({"conv1": 0.5, "conv2": 0.5, "fc1": 0.75, "fc2": 0.75})
    assert masks["fc2"]["bias"].mean() == 0.5
    assert "bias" not in masks["conv2"]
    legacy = [{"op_types": ["Linear"], "sparsity": 0.5}, {"op_names": ["fc2"], "exclude": True}]
    _, masks = MagnitudeWeightPruner(make("plain"), legacy).compress()
    assert densities(masks) == {"fc1": 0.5}
    apart = [{"op_names": [n], "sparse_ratio": r, "global_group_id": 1} for n, r in (("fc1", 0.5), ("fc2", 0.6))]
    with pytest.raises(PruningError, match="global_group_id 1: its entries ask for different sparsities"):
        MagnitudeWeightPruner(make("plain"), apart).compress()


def test_bounds_thresholds_and_groups_of_the_configuration():
    net = make("plain")
    config = [{"op_types": CONV, "sparse_ratio": 0.9, "max_sparse_ratio": 0.95, "min_sparse_ratio": 0.85}]
    _, masks = MagnitudeWeightPruner(net, config, scope="global").compress()
    assert all(0.05 - 1e-2 <= d <= 0.15 + 1e-2 for d in densities(masks).values())
    level = 0.05
    net = make("plain")
    weight = net.conv2.weight.detach()
    _, masks = MagnitudeWeightPruner(net, [{"op_names": ["conv2"], "sparse_threshold": level}]).compress()
    assert torch.equal(masks["conv2"]["weight"] == 1, weight.abs() >= level)
    grouped = [{"op_names": [n], "sparse_ratio": 0.7, "global_group_id": "all"} for n in ("conv1", "conv2")]
    _, masks = MagnitudeWeightPruner(make("plain"), grouped).compress()
    sizes = {n: t["weight"].numel() for n, t in masks.items()}
    assert sum(t["weight"].sum() for t in masks.values()) == round(0.3 * sum(sizes.values()))
    assert len(set(densities(masks).values())) == 2
    impossible = [{"op_types": CONV, "sparse_ratio": 0.9, "max_sparse_ratio": 0.5}]
    with pytest.raises(BudgetError, match=r"0\.500 is the most"):
        MagnitudeWeightPruner(make("plain"), impossible).compress()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_blocks_and_kernels_by_granularity(scope):
    config = [{"op_types": CONV, "op_names": ["conv2", "conv3"], "sparse_ratio": 0.5, "granularity": [1, 1, -1, -1]}]
    _, masks = MagnitudeWeightPruner(make("plain"), config, scope=scope).compress()
    kernels = masks["conv2"]["weight"].flatten(2)
    assert (kernels.amin(2) == kernels.amax(2)).all()
    assert sum(t["weight"].sum() for t in masks.values()) == sum(t["weight"].numel() for t in masks.values()) / 2
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [4, 4]}]
    mask = MagnitudeWeightPruner(make("plain"), config, scope=scope).compress()[1]["fc1"]["weight"]
    blocks = mask.view(10, 4, 8, 4).permute(0, 2, 1, 3).flatten(2)
    assert (blocks.amin(2) == blocks.amax(2)).all()
    assert mask.mean() == 0.5


def test_the_pattern_holds_in_every_layer_and_a_higher_ratio_removes_more():
    net = make("plain")
    pruner = MagnitudeWeightPruner(net, [{"op_types": [*CONV, "Linear"], "sparse_ratio": 0.7}], pattern="2:4")
    _, masks = pruner.compress()
    for name, targets in masks.items():
        module = net.get_submodule(name)
        assert Pattern(2, 4).holds(targets["weight"], *input_layout(module)), name
    assert pruner.sparsity == pytest.approx(0.7, abs=0.01)
    with pytest.raises(PruningError, match="no 2:4 pattern"):
        MagnitudeWeightPruner(make("plain"), [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], pattern="2:4")


def test_gradual_pruning_reaches_the_pattern_one_weight_after_the_other(make_evaluator):
    net = small()
    seen = []

    class Watched(MagnitudeWeightPruner):
        def prune(self, fraction=1.0):
            masks = super().prune(fraction)
            seen.append({n: t["weight"].clone() for n, t in masks.items()})
            return masks

    config = [{"op_names": ["2", "6"], "sparse_ratio": 0.5}]
    schedule = {"shape": "linear", "times": 2, "interval_steps": 2}
    Watched(net, config, make_evaluator(net), pattern="2:4", schedule=schedule).compress()
    assert [round(float(m["2"].mean()), 3) for m in seen] == [0.75, 0.5]
    assert Pattern(3, 4).holds(seen[0]["2"])
    assert Pattern(2, 4).holds(seen[1]["2"])
    assert (seen[1]["2"] <= seen[0]["2"]).all()


def test_a_cubic_schedule_and_nnis_agp_pruner_drive_it(make_evaluator):
    from nni.compression.pruning import AGPPruner

    ratios = {}
    for kind in ("ours", "nni"):
        net, found = small(), []

        class Watched(MagnitudeWeightPruner):
            def prune(self, fraction=1.0, found=found):
                masks = super().prune(fraction)
                found.append(round(self.sparsity, 2))
                return masks

        config = [{"op_types": CONV, "sparse_ratio": 0.8}]
        if kind == "ours":
            schedule = {"shape": "cubic", "times": 4, "interval_steps": 2}
            Watched(net, config, make_evaluator(net), schedule=schedule).compress()
        else:
            AGPPruner(Watched(net, config), 2, 4, make_evaluator(net)).compress(8, None)
        ratios[kind] = found
    assert ratios["ours"] == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in range(1, 5)], abs=0.01)
    assert ratios["nni"][:4] == ratios["ours"]


def test_gradient_scores_are_the_mean_of_weight_times_gradient(make_evaluator, digits):
    images, labels = digits
    net, twin = small(), small()
    pruner = GradientWeightPruner(net, [{"op_types": CONV, "sparse_ratio": 0.5}], make_evaluator(net), 4)
    pruner.compress()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    total = torch.zeros_like(twin[2].weight)
    for step in range(4):
        optimizer.zero_grad()
        at = step * 64
        nn.functional.cross_entropy(twin(images[at : at + 64]), labels[at : at + 64]).backward()
        total += (twin[2].weight * twin[2].weight.grad).abs().detach()
        optimizer.step()
    torch.testing.assert_close(pruner.scores["2.weight"], total / 4)
    mask = pruner.get_masks()["2"]["weight"]
    assert pruner.scores["2.weight"][mask == 1].min() >= pruner.scores["2.weight"][mask == 0].max()


def test_resuming_the_gradient_pruner(digits, tmp_path):
    config = [{"op_types": CONV, "sparse_ratio": 0.6}]
    schedule = {"shape": "linear", "times": 3, "interval_steps": 4}
    make_pruner = lambda model, evaluator: GradientWeightPruner(  # noqa: E731
        model, config, evaluator, schedule=schedule, scope="global"
    )
    assert_resumes(small, make_pruner, digits, tmp_path / "state.pt", 6)


def test_resuming_the_magnitude_pruner(digits, tmp_path):
    config = [{"op_types": CONV, "sparse_ratio": 0.6}]
    make_pruner = lambda model, evaluator: MagnitudeWeightPruner(  # noqa: E731
        model, config, evaluator, schedule={"shape": "cubic", "times": 3, "interval_steps": 4}
    )
    assert_resumes(small, make_pruner, digits, tmp_path / "state.pt", 6)


def test_tied_weights_have_one_mask_and_are_tied_again():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    torch.manual_seed(0)
    net = Tied()
    pruner = MagnitudeWeightPruner(net, [{"op_types": ["Embedding", "Linear"], "sparse_ratio": 0.5}])
    assert list(pruner.parameters) == ["embed.weight"]
    model, masks = pruner.compress()
    assert torch.equal(masks["embed"]["weight"], masks["head"]["weight"])
    model(torch.arange(3)).sum().backward()
    assert torch.equal(net.embed.weight, net.head.weight)
    pruner.unwrap_model()
    assert net.embed.weight is net.head.weight


def test_a_second_pruner_adds_to_the_first_and_dead_channels_stay_dead():
    net = make("plain")
    first = MagnitudePruner(net, [{"op_names": ["conv2"], "sparse_ratio": 0.25}], dummy_input=X)
    _, before = first.compress()
    second = MagnitudeWeightPruner.from_compressor(first, [{"op_types": CONV, "sparse_ratio": 0.6}], scope="global")
    model, after = second.compress()
    for name, targets in before.items():
        for target, mask in targets.items():
            assert (after[name][target] <= mask).all()
    assert second.sparsity == pytest.approx(0.6, abs=0.01)
    masked = model(X)
    second.unwrap_model()
    compact = ModelSpeedup(net, X, after).speedup_model()
    assert compact.conv2.out_channels == 18
    torch.testing.assert_close(compact(X), masked, rtol=0, atol=1e-5)


def test_whole_units_that_die_are_removed_by_the_speedup():
    net = make("plain")
    with torch.no_grad():
        net.conv2.weight[:6].mul_(1e-9)
        net.conv2.bias[:6] = -1.0
    pruner = MagnitudeWeightPruner(net, [{"op_names": ["conv2"], "sparse_ratio": 0.25}])
    model, masks = pruner.compress()
    masked = model(X)
    pruner.unwrap_model()
    compact = ModelSpeedup(net, X, masks).speedup_model()
    assert compact.conv2.out_channels == 18
    torch.testing.assert_close(compact(X), masked, rtol=0, atol=1e-5)


def test_a_copy_for_an_average_of_weights_has_masks_of_its_own(make_evaluator):
    net = small()
    pruner = MagnitudeWeightPruner(net, [{"op_types": CONV, "sparse_ratio": 0.5}])
    model, masks = pruner.compress()
    x = torch.rand(1, 1, 8, 8)
    model(x)
    average = copy.deepcopy(model)
    before = average(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(average(x), before)
    assert torch.equal(average[2].weight == 0, masks["2"]["weight"] == 0)


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        ([{"op_types": ["Conv9d"], "sparse_ratio": 0.5}], {}, "no module has these types"),
        ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], {}, "holds a weight"),
        ([{"op_types": CONV, "sparse_ratio": 1.0}], {}, r"must be in \[0, 1\)"),
        ([{"op_types": CONV}], {}, "neither sparse_ratio"),
        ([{"op_types": CONV, "sparse_ratio": 0.5}], {"scope": "block"}, "scope is 'block'"),
        ([{"op_types": CONV, "sparse_ratio": 0.5}], {"density": "even"}, "density is 'even'"),
        ([{"op_types": CONV, "sparse_ratio": 0.5}], {"density": "erk", "scope": "global"}, "ranks all layers together"),
        ([{"op_types": CONV, "sparse_ratio": 0.5}], {"pattern": "4:2"}, "pattern is 4:2"),
    ],
)
def test_mistakes_are_named_in_one_line(config, kwargs, message):
    with pytest.raises(PruningError, match=message) as caught:
        MagnitudeWeightPruner(small(), config, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_wrapped_model_is_refused():
    net = small()
    config = [{"op_types": CONV, "sparse_ratio": 0.5}]
    MagnitudeWeightPruner(net, config)
    with pytest.raises(PruningError, match="use from_compressor"):
        MagnitudeWeightPruner(net, config)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_grad_scaler_does_not_change_gradient_scores(digits, autocast):
    import nni
    from nni.compression import TorchEvaluator

    images, labels = digits
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)):
        net = small()

        def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None, scaler=scaler):
            for step in range(max_steps + 1):
                optimizer.zero_grad()
                loss = training_step((images[step * 32 : step * 32 + 32], labels[step * 32 : step * 32 + 32]), model)
                if step == 2:
                    if scaler is None:
                        continue  # what the scaler skips
                    loss = loss * torch.inf
                (loss if scaler is None else scaler.scale(loss)).backward()
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)  # the scale doubles every other step
                    scaler.update()

        def training_step(batch, model):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

        optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05)
        pruner = GradientWeightPruner(
            net, [{"op_types": CONV, "sparse_ratio": 0.5}], TorchEvaluator(train, optimizer, training_step), 6
        )
        pruner.compress()
        found.append(pruner.scores["2.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=0.05 if autocast else 1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_memory_formats(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)).to(kind).to(memory_format=torch.channels_last)
    plain = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)).to(kind)
    plain.load_state_dict(net.state_dict())
    for options in ({}, {"scope": "global"}, {"pattern": "2:4"}, {"density": "erk"}):
        config = [{"op_types": CONV, "sparse_ratio": 0.5}]
        first, second = (MagnitudeWeightPruner(copy.deepcopy(n), config, **options) for n in (net, plain))
        (_, one), (_, other) = first.compress(), second.compress()
        assert first.sparsity == pytest.approx(0.5, abs=0.001)
        assert all(torch.equal(one[n]["weight"], other[n]["weight"]) for n in one)
        assert one["1"]["weight"].dtype == kind


@pytest.mark.parametrize("kind", ["lightning", "transformers"])
def test_gradient_scores_where_a_trainer_makes_the_steps(kind, digits, tmp_path):
    """Lightning makes the gradients inside the step; both hook several tasks to it."""
    if kind == "lightning":
        model, evaluator = lightning(digits, tmp_path)
        config = [{"op_types": CONV, "sparse_ratio": 0.5}]
    else:
        model, evaluator = transformers(tmp_path)
        config = [{"op_names_re": [r".*(query|intermediate\.dense)"], "sparse_ratio": 0.5}]
    pruner = GradientWeightPruner(model, config, evaluator, 5)
    pruner.compress()
    assert pruner._step == 5
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(score.std() > 0 for score in pruner.scores.values())
