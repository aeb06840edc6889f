import copy

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import BudgetError, L0Pruner, PruningError
from nni_plugins.speedup import ModelSpeedup

from .nets import NETS, X, make
from .resuming import assert_resumes
from .trainers import lightning, transformers
from .two_ranks import needs_gloo, on_two_ranks

CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 24), nn.Sigmoid(), nn.Linear(24, 10),
    )  # fmt: skip


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def evaluator_of(model, digits, *, rate=0.02, scaler=None, autocast=False, spoil=(), batch=32, parts=1):
    images, labels = digits

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        for step in range(max_steps):
            optimizer.zero_grad()
            for part in range(parts):
                at = (step * parts + part) * (batch // parts) % (len(images) - batch)
                loss = (
                    training_step((images[at : at + batch // parts], labels[at : at + batch // parts]), model) / parts
                )
                loss = loss * torch.inf if step in spoil else loss
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def training_step(batch, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=rate, momentum=0.9)
    return TorchEvaluator(train, optimizer, training_step, dummy_input=images[:2])


def pruned(digits, model=None, steps=60, config=CONFIG, options=None, **kwargs):
    model = net() if model is None else model
    pruner = L0Pruner(model, config, evaluator_of(model, digits, **(options or {})), steps, **kwargs)
    _, masks = pruner.compress()
    return model, pruner, masks


@pytest.mark.parametrize(("build", "target"), [(mlp, "macs"), (mlp, "channels"), (net, "params")])
def test_the_expected_cost_is_what_was_asked(digits, build, target):
    _, pruner, _ = pruned(digits, build(), 200, target=target)
    assert float(pruner.expected[0]) == pytest.approx(0.5, abs=0.02)
    if target != "channels":
        cost, dense = pruner.plan.cost(), pruner.graph.cost()
        assert getattr(cost, target) / getattr(dense, target) == pytest.approx(0.5, abs=0.02)
    else:
        assert sum(pruner.plan.counts.values()) == 40


def test_each_budget_has_multipliers_of_its_own(digits):
    config = [{"op_names": ["1"], "sparse_ratio": 0.25}, {"op_names": ["4"], "sparse_ratio": 0.75}]
    _, pruner, _ = pruned(digits, mlp(), 150, config)
    assert pruner.expected.tolist() == pytest.approx([0.75, 0.25], abs=0.03)
    assert pruner.plan.counts == {"1": 36, "4": 8}


def test_the_local_scope_closes_the_same_fraction_of_each_group(digits):
    _, pruner, _ = pruned(digits, mlp(), 120, scope="local")
    assert pruner.expected.tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    assert pruner.plan.counts == {"1": 24, "4": 16}


def test_gates_are_folded_into_the_weights(digits):
    """With the asked sparsity at what the gates want, the masked model is the gated one; nothing of the gates stays."""
    model = net()
    keys = list(model.state_dict())
    pruner = L0Pruner(model, CONFIG, evaluator_of(model, digits), 40)
    seen = {}
    fold = pruner._fold

    def watched():
        model.eval()
        with torch.no_grad():
            seen["gated"] = model(digits[0][:8])
        seen["gates"] = pruner.gates.settled()
        fold()
        with torch.no_grad():
            seen["folded"] = model(digits[0][:8])

    pruner._fold = watched
    pruner.compress()
    torch.testing.assert_close(seen["folded"], seen["gated"])
    assert ((seen["gates"] > 0) & (seen["gates"] < 1)).any()
    pruner.unwrap_model()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_compact_model_is_the_masked_one(name):
    """Streams of several producers, concatenation, depthwise and grouped convolutions, squeeze and excite."""
    model = make(name)

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        for _ in range(max_steps):
            optimizer.zero_grad()
            training_step(X, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    evaluator = TorchEvaluator(train, optimizer, lambda x, m: m(x).square().mean(), dummy_input=X)
    pruner = L0Pruner(model, CONFIG, evaluator, 4, target="macs")
    _, masks = pruner.compress()
    model.eval()
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, X, masks)
    speedup.speedup_model()
    assert speedup.report.max_error < 1e-5
    assert speedup.report.macs_after / speedup.report.macs_before == pytest.approx(0.5, abs=0.03)


def test_a_gate_multiplies_what_a_unit_gives_its_readers(digits):
    """Whatever the activation maps zero to, and whatever norm scales it back: a gate at 0.5 halves what is read."""
    model = net().eval()
    pruner = L0Pruner(model, CONFIG, evaluator_of(model, digits), 10)
    images = digits[0][:4]
    with torch.no_grad():
        dense = copy.deepcopy(model)(images)
        pruner._watch_training(evaluator_of(model, digits))
        torch.testing.assert_close(model(images), dense)
        pruner.gates.log_alpha.zero_()
        pruner.gates.draw()
        halved = model(images)
        handles = [pruner.bound_model[i].register_forward_hook(lambda m, a, out: out * 0.5) for i in (2, 4, 8)]
        pruner.gates.log_alpha.fill_(4.0)
        pruner.gates.draw()
        torch.testing.assert_close(halved, model(images))
    for handle in handles:
        handle.remove()


def test_the_gradient_by_log_alpha_is_that_of_autograd(digits):
    from nni_plugins.pruners.gates import drawn

    model = net().eval()
    pruner = L0Pruner(model, CONFIG, evaluator_of(model, digits), 10)
    pruner._watch_training(evaluator_of(model, digits))
    model.train()
    pruner.gates.log_alpha.normal_(0, 1.5, generator=torch.Generator().manual_seed(0))
    twin = torch.Generator()
    twin.set_state(pruner._generator.get_state())
    pruner.gates.draw()
    images, labels = (t[:16] for t in digits)
    nn.functional.cross_entropy(model(images), labels).backward()
    found = pruner.gates.gradient()
    log_alpha = pruner.gates.log_alpha.clone().requires_grad_()
    values, _ = drawn(log_alpha, torch.rand(48, generator=twin))
    spread = torch.cat([values, torch.ones(1)])[pruner.gates._places]
    sizes = [leaf.numel() for leaf in pruner.gates.leaves]
    pruner.gates.leaves = [p.view(leaf.shape) for p, leaf in zip(spread.split(sizes), pruner.gates.leaves, strict=True)]
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), log_alpha)
    torch.testing.assert_close(found, expected)
    assert (found != 0).sum() > 10


def test_no_group_closes_altogether(digits):
    """Without its last open gate a group passes nothing on, and no gradient would ever open one again."""
    model = net()
    pruner = L0Pruner(model, CONFIG, evaluator_of(model, digits), 10)
    pruner.gates.log_alpha.fill_(-4.6)
    pruner._bound()
    assert [int((part > 0).sum()) for part in pruner.gates.log_alpha.split([8, 16, 24])] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["scaler", "accumulation"])
def test_the_scale_of_the_loss_does_not_matter(digits, kind):
    """Without its remedy the gates would see gradients 1024 times too large beside the budget's, or half too small."""
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)} if kind == "scaler" else {"parts": 2}
    plain = pruned(digits, mlp_without_norm(), 12)[1]
    other = pruned(digits, mlp_without_norm(), 12, options=options)[1]
    torch.testing.assert_close(other.gates.log_alpha, plain.gates.log_alpha, atol=2e-3, rtol=1e-3)


def mlp_without_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def test_steps_that_are_not_finite_are_left_out(digits):
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0), "spoil": (3, 4), "autocast": True}
    _, pruner, _ = pruned(digits, steps=40, options=options)
    assert pruner.gates.log_alpha.isfinite().all()
    assert pruner.plan.counts


def test_units_of_an_earlier_pruner_stay_away_and_count(digits):
    from nni_plugins.pruners import MagnitudePruner

    model = mlp()
    first = MagnitudePruner(model, [{"op_names": ["1"], "sparse_ratio": 0.5}], evaluator_of(model, digits))
    first.compress()
    gone = set(range(48)) - set(first.plan.kept["1"].tolist())
    pruner = L0Pruner.from_compressor(first, CONFIG, 60)
    pruner.compress()
    assert not gone & set(pruner.plan.kept["1"].tolist())
    assert sum(pruner.plan.counts.values()) == 40


def test_the_same_seed_gives_the_same_masks_and_another_gives_others(digits):
    runs = [pruned(digits, steps=30, seed=seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(runs[0].gates.log_alpha, runs[1].gates.log_alpha)
    assert not torch.equal(runs[0].gates.log_alpha, runs[2].gates.log_alpha)
    assert {n: k.tolist() for n, k in runs[0].plan.kept.items()} == {
        n: k.tolist() for n, k in runs[1].plan.kept.items()
    }


@pytest.mark.parametrize("at", [1, 17])
def test_resumes_bit_for_bit(at, digits, tmp_path):
    assert_resumes(net, lambda m, e: L0Pruner(m, CONFIG, e, 30, target="macs"), digits, tmp_path / "state.pt", at)


def test_it_fuses_with_a_distiller(digits):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    model, teacher = net(), net(1)
    config = [{"op_names": ["3"], "link": "3", "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller(
        model, config, evaluator_of(model, digits), teacher, lambda batch, model: model(batch[0])
    )
    pruner = L0Pruner.from_compressor(distiller, CONFIG, 40)
    _, masks = pruner.compress()
    assert pruner.finished
    assert sum(pruner.plan.counts.values()) == 24
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, digits[0][:2], masks)
    speedup.speedup_model()
    assert speedup.report.max_error < 1e-5


def test_an_average_of_the_weights_runs_under_the_gates(digits):
    model = net()
    pruner = L0Pruner(model, CONFIG, evaluator_of(model, digits), 20)
    pruner._watch_training(evaluator_of(model, digits))
    model(digits[0][:2])
    average = copy.deepcopy(model).eval()
    pruner.gates.log_alpha.fill_(-1.0)
    pruner.gates.draw()
    torch.testing.assert_close(average(digits[0][:2]), model.eval()(digits[0][:2]))


def test_lightning(digits, tmp_path):
    model, evaluator = lightning(digits, tmp_path)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = L0Pruner(model, config, evaluator, 50)
    pruner.compress()
    assert pruner.finished
    assert pruner.gates.log_alpha.std() > 0.5
    assert sum(pruner.plan.counts.values()) == 12


def test_transformers(tmp_path):
    model, evaluator = transformers(tmp_path)
    config = [{"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}]
    x = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    pruner = L0Pruner(model, config, evaluator, 24, dummy_input=x)
    pruner.compress()
    assert pruner.finished
    assert list(pruner.plan.counts.values()) == [16]
    assert pruner.gates.log_alpha.std() > 0.5


RANK = """
from nni_plugins.pruners import L0Pruner

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
pruner = L0Pruner(net, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], evaluator, 30)
_, masks = pruner.compress()
result = (masks["0"]["weight"], pruner.gates.log_alpha, pruner.parameters["2.weight"].detach())
"""


@needs_gloo
def test_two_processes_train_the_same_gates(tmp_path):
    first, second = on_two_ranks(RANK, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert int((first[0].sum(1) > 0).sum()) == 16


def test_mistakes_are_named_in_one_line(digits):
    model = net()
    x = digits[0][:2]
    with pytest.raises(PruningError, match="needs an evaluator"):
        L0Pruner(model, CONFIG, None, dummy_input=x)
    with pytest.raises(PruningError, match="training_steps is 0; it must be a whole number, at least 1"):
        L0Pruner(model, CONFIG, evaluator_of(model, digits), 0)
    with pytest.raises(PruningError, match="warmup is 2"):
        L0Pruner(model, CONFIG, evaluator_of(model, digits), warmup=2)
    with pytest.raises(PruningError, match="no schedule"):
        L0Pruner(model, CONFIG, evaluator_of(model, digits), schedule="linear")
    config = [{"op_types": ["Conv2d"], "sparse_threshold": 0.5}]
    with pytest.raises(PruningError, match="give sparse_ratio"):
        L0Pruner(net(), config, evaluator_of(model, digits))
    far = net()
    config = [{"op_names": ["0"], "sparse_ratio": 0.9}]
    pruner = L0Pruner(far, config, evaluator_of(far, digits), target="macs")
    with pytest.raises(BudgetError, match="out of reach"):
        pruner.compress()


def test_heads_and_hidden_units_of_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(8, 32), layer, nn.Flatten(), nn.Linear(160, 10))
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        for _ in range(max_steps):
            optimizer.zero_grad()
            training_step(x, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.02)
    evaluator = TorchEvaluator(train, optimizer, lambda x, m: (m(x) - x.sum()).square().mean() * 1e-3, dummy_input=x)
    config = [{"op_types": ["MultiheadAttention", "Linear"], "sparse_ratio": 0.5}]
    pruner = L0Pruner(model, config, evaluator, 20, scope="local")
    _, masks = pruner.compress()
    assert sorted(pruner.plan.counts.values()) == [2, 32]
    model.eval()
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    assert speedup.report.max_error < 1e-5
