import copy

import pytest
import torch
from torch import nn

from nni_plugins.pruners import BudgetError, MagnitudePruner, PruningError, SynapticStrengthPruner
from nni_plugins.speedup import ModelSpeedup

from .nets import NETS, X, make
from .resuming import assert_resumes
from .test_l0 import evaluator_of
from .trainers import lightning, transformers
from .two_ranks import needs_gloo, on_two_ranks

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
ALL = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def settled(model, seed=0):
    """The norms' affine parameters and statistics as if trained, some scales negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(len(module.weight), generator=generator) * 1.5
            module.weight.data[1] *= -1
            module.bias.data = torch.randn(len(module.bias), generator=generator) * 0.3
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


class Skip(nn.Module):
    """A stream with two producers of different scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.n0 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.n1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.last, self.n2 = nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = self.n0(self.stem(x)).relu()
        x = (x + self.n1(self.conv(x))).relu()
        return self.fc(self.n2(self.last(x)).relu().mean((2, 3)))


def one_shot(model, config=CONFIG, x=None, **kwargs):
    pruner = SynapticStrengthPruner(model, config, dummy_input=torch.randn(4, 1, 8, 8) if x is None else x, **kwargs)
    _, masks = pruner.compress()
    return pruner, masks


def table(mask):
    return mask.flatten(2).any(2) if mask.dim() > 2 else mask > 0


def kept(pruner, masks):
    tables = [table(masks[claim.module]["weight"]) for claim in pruner.claims]
    return sum(int(t.sum()) for t in tables) / sum(t.numel() for t in tables)


# -- strengths -----------------------------------------------------------------------------------------------------


def test_a_strength_is_the_norms_scale_times_the_kernels_norm():
    model = settled(net())
    gamma, kernels = model[1].weight.detach().abs(), model[4].weight.detach()
    pruner, _ = one_shot(model)
    torch.testing.assert_close(pruner.scores["4.weight"], gamma[None] * kernels.flatten(2).norm(dim=2))


def test_residual_inputs_are_measured():
    """The stream's scale is neither that of its first norm nor of its last: what the layer reads is measured."""
    model = settled(Skip()).eval()
    x, seen = torch.randn(4, 1, 8, 8), []
    handle = model.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    deviation = seen[0].movedim(1, 0).flatten(1).std(1, unbiased=False)
    expected = deviation[None] * model.last.weight.detach().flatten(2).norm(dim=2)
    pruner, _ = one_shot(model, x=x)
    torch.testing.assert_close(pruner.scores["last.weight"], expected)
    assert pruner._producers.readings["last.weight"].norms == ()
    assert pruner._producers.readings["conv.weight"].norms[0][0] == "n0"


def test_a_layer_that_reads_no_norm_is_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    model[0].weight.data[2] *= 0.01
    model[0].bias.data[2] = 3.0  # strong, but it carries nothing
    blank = copy.deepcopy(model)
    pruner, masks = one_shot(model)
    assert pruner.scores["2.weight"].mean(0).argmin() == 2
    assert not table(masks["2"]["weight"])[:, 2].any()
    pruner, _ = one_shot(blank, x=torch.zeros(1, 1, 8, 8))  # nothing varies: the kernels alone count
    torch.testing.assert_close(pruner.scores["2.weight"], blank[2]._nni_wrapper.weight.detach().flatten(2).norm(dim=2))


def test_the_scale_of_a_layer_or_row_before_a_norm_is_of_no_effect():
    model = settled(net()).eval()
    scaled = copy.deepcopy(model)
    scaled[0].weight.data *= 50
    scaled[1].running_mean *= 50
    scaled[1].running_var *= 2500
    scaled[4].weight.data[3] *= 0.01
    x = torch.randn(4, 1, 8, 8)
    masks, other = one_shot(model, x=x)[1], one_shot(scaled, x=x)[1]
    assert all(torch.equal(masks[name]["weight"], other[name]["weight"]) for name in ("0", "4"))
    plain = [one_shot(copy.deepcopy(m), x=x, normalise=None)[1]["4"]["weight"] for m in (settled(net()), scaled_net())]
    assert not torch.equal(*plain)  # without the remedy the small row would be gone


def scaled_net():
    model = settled(net())
    model[4].weight.data[3] *= 0.01
    return model


def test_rows_of_few_inputs_are_not_the_first_to_go():
    """By the mean of its row, the one kernel of each row of the first layer would be average, and all of them go."""
    model = make("plain")
    _, masks = one_shot(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.8}], X)
    parts = [float(table(masks[name]["weight"]).float().mean()) for name in ("conv1", "conv2", "conv3")]
    assert parts[0] > parts[1] > parts[2]


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_grouped_and_depthwise_kernels_read_their_own_inputs(name):
    model = make(name)
    layer, norm = (model.conv2, model.bn1) if name == "grouped" else (model.depth, model.bn1)
    kernels, gamma = layer.weight.detach().flatten(2).norm(dim=2), norm.weight.detach().abs()
    pruner, _ = one_shot(model, x=X)
    rows, columns = kernels.shape
    expected = torch.empty_like(kernels)
    for row in range(rows):
        for column in range(columns):
            expected[row, column] = gamma[row // (rows // layer.groups) * columns + column] * kernels[row, column]
    layer_name = "conv2" if name == "grouped" else "depth"
    torch.testing.assert_close(pruner.scores[f"{layer_name}.weight"], expected)


def test_transposed_convolutions_have_inputs_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, groups=2))
    model[1].weight.data = torch.tensor([1.0, 2, 3, 4, 5, 6])
    kernels = model[3].weight.detach().flatten(2).norm(dim=2)
    pruner, _ = one_shot(model, [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.5}])
    torch.testing.assert_close(pruner.scores["3.weight"], model[1].weight.detach()[:, None] * kernels)


# -- folding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [net, Skip])
def test_folding_a_norm_changes_nothing(build, digits):
    """Scales that are negative stay where they are; β goes to β/γ; a norm whose result goes to a sum is left alone."""
    model = settled(build()).eval()
    x, names = digits[0][:8], [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before, gammas = model(x).detach(), {name: model.get_submodule(name).weight.detach().clone() for name in names}
    evaluator = evaluator_of(model, digits)
    pruner = SynapticStrengthPruner(model, ALL, evaluator, 5)
    pruner._watch_training(evaluator)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    folded = {"net": {"1", "5"}, "Skip": {"n2"}}[build.__name__]
    assert set(pruner._folded) == folded
    for name in names:
        now, old = pruner._live(f"{name}.weight").detach(), gammas[name]
        assert (old < 0).any()
        torch.testing.assert_close(now, torch.where(old > 1e-3, 1.0, old) if name in folded else old)


def test_a_norm_that_an_unselected_layer_reads_is_not_folded(digits):
    model = settled(net())
    pruner = SynapticStrengthPruner(model, CONFIG, evaluator_of(model, digits), 5)
    pruner._watch_training(evaluator_of(model, digits))
    assert set(pruner._folded) == {"1"}


def test_a_bent_activation_is_no_way_to_fold_through(digits):
    model = settled(nn.Sequential(*[nn.SiLU() if isinstance(m, nn.ReLU) else m for m in net()]))
    pruner = SynapticStrengthPruner(model, ALL, evaluator_of(model, digits), 5)
    pruner._watch_training(evaluator_of(model, digits))
    assert not pruner._folded
    assert pruner._producers.readings["4.weight"].norms[0][0] == "1"


# -- training ------------------------------------------------------------------------------------------------------


def trained(digits, model=None, steps=40, config=ALL, options=None, **kwargs):
    model = net() if model is None else model
    pruner = SynapticStrengthPruner(model, config, evaluator_of(model, digits, **(options or {})), steps, **kwargs)
    _, masks = pruner.compress()
    return model, pruner, masks


def test_the_penalty_makes_strengths_small_and_the_norms_scale_stays(digits):
    """Free to grow, γ would undo what the penalty does."""
    totals = {}
    for penalty in (0.0, 0.02):
        _, pruner, _ = trained(digits, settled(net()), penalty=penalty, rate=0.05)
        totals[penalty] = float(pruner.scores["4.weight"].sum())
        gamma, fit = pruner._live("1.weight").detach(), pruner._folded["1"]
        assert fit.any()
        assert (gamma[fit] == 1).all()
    assert totals[0.02] < 0.9 * totals[0.0]


def test_the_trained_form_is_written_back(digits):
    model = net()
    keys = list(model.state_dict())
    pruner = SynapticStrengthPruner(model, ALL, evaluator_of(model, digits), 20)
    seen = {}
    plain = pruner._make_plain

    def watched():
        model.eval()
        with torch.no_grad():
            seen["trained"] = model(digits[0][:8])
            plain()
            seen["plain"] = model(digits[0][:8])

    pruner._make_plain = watched
    pruner.compress()
    torch.testing.assert_close(seen["plain"], seen["trained"])
    pruner.unwrap_model()
    assert list(model.state_dict()) == keys
    assert not any(hasattr(space, "synapse") for space in pruner._targets.values())


@pytest.mark.parametrize("kind", ["scaler", "accumulation"])
def test_the_scale_of_the_loss_does_not_matter(digits, kind):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)} if kind == "scaler" else {"parts": 2}
    plain = trained(digits, copy.deepcopy(mlp), 8)[1]
    other = trained(digits, mlp, 8, options=options)[1]
    for name in plain.strengths:
        torch.testing.assert_close(other.strengths[name].strength, plain.strengths[name].strength, atol=1e-5, rtol=1e-4)


def test_steps_that_are_not_finite_are_left_out(digits):
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0), "spoil": (3, 4), "autocast": True}
    _, pruner, _ = trained(digits, steps=20, options=options)
    assert all(s.strength.isfinite().all() for s in pruner.strengths.values())


@pytest.mark.parametrize("at", [1, 13])
def test_resumes_bit_for_bit(at, digits, tmp_path):
    def pruner(model, evaluator):
        return SynapticStrengthPruner(model, ALL, evaluator, 20, penalty=1e-3)

    assert_resumes(Skip, pruner, digits, tmp_path / "state.pt", at)


def test_a_schedule_takes_synapses_in_steps(digits):
    model = net()
    schedule = {"shape": "cubic", "times": 4, "interval_steps": 5}
    pruner = SynapticStrengthPruner(model, ALL, evaluator_of(model, digits), 20, schedule=schedule)
    _, masks = pruner.compress()
    assert kept(pruner, masks) == pytest.approx(0.5, abs=0.02)


def test_it_fuses_with_a_distiller(digits):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    model, teacher = net(), net(1)
    config = [{"op_names": ["4"], "link": "4", "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller(
        model, config, evaluator_of(model, digits), teacher, lambda batch, model: model(batch[0])
    )
    pruner = SynapticStrengthPruner.from_compressor(distiller, CONFIG, 20)
    _, masks = pruner.compress()
    assert pruner.finished
    assert kept(pruner, masks) == pytest.approx(0.5, abs=0.02)


def test_lightning(digits, tmp_path):
    model, evaluator = lightning(digits, tmp_path)
    pruner = SynapticStrengthPruner(model, CONFIG, evaluator, 40)
    _, masks = pruner.compress()
    assert pruner.finished
    assert kept(pruner, masks) == pytest.approx(0.5, abs=0.02)


def test_transformers(tmp_path):
    model, evaluator = transformers(tmp_path)
    config = [{"op_names_re": [r".*(query|intermediate\.dense)"], "sparse_ratio": 0.5}]
    x = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    pruner = SynapticStrengthPruner(model, config, evaluator, 24, dummy_input=x)
    _, masks = pruner.compress()
    assert pruner.finished
    assert kept(pruner, masks) == pytest.approx(0.5, abs=0.02)


# -- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_compact_model_is_the_masked_one(name, ratio):
    model = make(name)
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio}]
    pruner, masks = one_shot(model, config, X)
    assert kept(pruner, masks) == pytest.approx(1 - ratio, abs=0.02)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, X, masks)
    speedup.speedup_model()
    assert speedup.report.max_error < 1e-5
    assert pruner.plan.kept
    assert all(len(units) > 0 for units in pruner.plan.kept.values())
    removed = {n: a for n, (a, _) in speedup.report.removed.items()}
    assert all(removed[name] <= len(units) for name, units in pruner.plan.kept.items())


@pytest.mark.parametrize("target", ["macs", "params"])
def test_budgets_of_kernels(target):
    model = make("plain")
    pruner, masks = one_shot(model, ALL, X, target=target)
    modules = pruner.graph.cost().modules
    total = gone = 0.0
    for claim in pruner.claims:
        mask = masks[claim.module]["weight"]
        whole = modules[claim.module][0] if target == "macs" else mask.numel()
        total += whole
        gone += whole * float((mask == 0).float().mean())
    assert gone / total == pytest.approx(0.5, abs=0.02)


def test_dead_columns_and_rows_take_their_channels_along():
    model = net()
    model[4].weight.data[:, 3] *= 1e-4  # nobody reads channel 3
    model[4].weight.data[5] *= 1e-4  # ... and the scale of a row before a norm says nothing
    model[9].weight.data[:, 7] *= 1e-4
    pruner, masks = one_shot(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.15}])
    assert 3 not in pruner.plan.kept["0"]
    assert not masks["0"]["weight"][3].any()
    assert masks["1"]["weight"][3] == 0
    assert masks["1"]["bias"][3] == 0
    assert 7 not in pruner.plan.kept["4"]
    assert not masks["4"]["weight"][7].any()
    assert masks["4"]["bias"][7] == 0
    assert 5 in pruner.plan.kept["4"]


def test_no_layer_is_cut_through():
    for name in sorted(NETS):
        model = make(name)
        one_shot(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.93}], X, tolerance=0.2)
        out = [model(X * scale) for scale in (1.0, 2.0)]
        assert not torch.allclose(*out, rtol=1e-6, atol=0), name


def test_the_local_scope_takes_as_much_of_each_layer():
    spread = {}
    for scope in ("global", "local"):
        pruner, masks = one_shot(make("plain"), ALL, X, scope=scope, normalise=None)
        parts = [float(table(masks[claim.module]["weight"]).float().mean()) for claim in pruner.claims]
        spread[scope] = max(parts) - min(parts)
    assert spread["local"] < 0.4 < spread["global"]


def test_bounds_thresholds_and_entries():
    config = [{"op_names": ["4"], "sparse_ratio": 0.6}, {"op_names": ["9"], "sparse_ratio": 0.2}]
    _, masks = one_shot(net(), config)
    assert float(table(masks["4"]["weight"]).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(table(masks["9"]["weight"]).float().mean()) == pytest.approx(0.8, abs=0.02)
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.55}]
    _, masks = one_shot(net(), config)
    assert all(float((~table(masks[n]["weight"])).float().mean()) < 0.6 for n in ("4", "9"))
    _, masks = one_shot(net(), [{"op_names": ["4"], "sparse_threshold": 0.3}])
    pruner, _ = one_shot(net(), [{"op_names": ["4"], "sparse_ratio": 0.0}])
    values = pruner._comparable("4.weight", pruner.scores["4.weight"], torch.ones(16, 8, dtype=torch.bool))
    assert int((values < 0.3).sum()) == int((~table(masks["4"]["weight"])).sum())


def test_what_an_earlier_pruner_removed_stays_removed():
    model = net()
    first = MagnitudePruner(model, [{"op_names": ["4"], "sparse_ratio": 0.5}], dummy_input=torch.randn(2, 1, 8, 8))
    first.compress()
    gone = set(range(16)) - set(first.plan.kept["4"].tolist())
    pruner = SynapticStrengthPruner.from_compressor(first, ALL, 0, dummy_input=torch.randn(2, 1, 8, 8))
    _, masks = pruner.compress()
    assert not gone & set(pruner.plan.kept["4"].tolist())
    assert kept(pruner, masks) == pytest.approx(0.5, abs=0.02)


def test_mistakes_are_named_in_one_line():
    x = torch.randn(2, 1, 8, 8)
    for kwargs, config, message in (
        ({"target": "channels"}, ALL, "target is 'channels'"),
        ({"scope": "isomorphic"}, ALL, "scope is 'isomorphic'"),
        ({"penalty": -1}, ALL, "penalty is -1"),
        ({}, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], "only these have synapses"),
    ):
        with pytest.raises(PruningError, match=message):
            SynapticStrengthPruner(net(), config, dummy_input=x, **kwargs)
    pruner = SynapticStrengthPruner(
        net(), [{"op_names": ["9"], "sparse_ratio": 0.9, "max_sparse_ratio": 0.5}], dummy_input=x
    )
    with pytest.raises(BudgetError, match="out of reach"):
        pruner.compress()


RANK = """
from nni_plugins.pruners import SynapticStrengthPruner

net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
data = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(10 + rank))

def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
    model = nn.parallel.DistributedDataParallel(model)
    for step in range(max_steps):
        optimizer.zero_grad()
        training_step(data[step], model).backward()
        optimizer.step()

def training_step(batch, model):
    return (model(batch) - batch[:, :4] * batch[:, 4:8]).square().mean()

evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05, momentum=0.9), training_step,
                           dummy_input=data[0])
pruner = SynapticStrengthPruner(net, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], evaluator, 15, penalty=1e-2)
_, masks = pruner.compress()
result = (masks["0"]["weight"], masks["2"]["weight"], pruner.parameters["2.weight"].detach())
"""


@needs_gloo
def test_two_processes_choose_alike(tmp_path):
    first, second = on_two_ranks(RANK, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_layer_that_is_called_twice_is_measured_and_its_norm_left_alone(digits):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv, self.n = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            x = self.bn(self.stem(x)).relu()
            for _ in range(2):
                x = self.n(self.conv(x)).relu()
            return self.fc(x.mean((2, 3)))

    model, pruner, masks = trained(digits, settled(Twice()), steps=12)
    assert pruner._producers.readings["conv.weight"].norms == ()
    assert "conv.weight" in pruner.deviations
    assert not pruner._folded
    model.eval()
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, digits[0][:2], masks)
    speedup.speedup_model()
    assert speedup.report.max_error < 1e-5


def test_what_is_excluded_is_read_all_the_same():
    """The norm before the selected layer belongs to a group that may not be pruned: its scale still counts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10)
    )
    with torch.no_grad():
        model[1].weight[:4] = 1e-4
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["0"], "sparse_ratio": 0.5}]
    pruner = SynapticStrengthPruner(model, config, None, 0, dummy_input=torch.randn(2, 1, 8, 8))
    _, masks = pruner.compress()
    assert masks["3"]["weight"].flatten(2).amax(2).sum() == 32
    assert masks["3"]["weight"][:, :4].sum() == 0


@pytest.mark.parametrize("own", [False, True])
def test_a_norm_without_a_scale_is_measured(digits, own):
    """Of a norm without parameters, or with some of other names, the statistics were taken for its scale."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            return nn.functional.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)

    torch.manual_seed(0)
    norm = Norm() if own else nn.BatchNorm2d(8, affine=False)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    pruner = SynapticStrengthPruner(
        model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator_of(model, digits), 6
    )
    _, masks = pruner.compress()
    assert set(pruner.deviations) == {"0.weight", "3.weight"}
    assert 0.4 < 1 - float(masks["3"]["weight"].mean()) < 0.7
