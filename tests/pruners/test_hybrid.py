"""HybridPruner: budgets, equality of the live-compacted model, everything that follows, and faults."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.pruners import BudgetError, HybridPruner, PruningError
from nni_plugins.pruners.exploration import Layer, fitted, patterned, region
from nni_plugins.pruners.live import compact_live
from nni_plugins.pruners.patterns import Pattern
from nni_plugins.speedup import ModelSpeedup, load_compact, save_compact

from .resuming import assert_resumes
from .trainers import lightning, transformers
from .two_ranks import needs_gloo, on_two_ranks

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def small(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 10),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        return self.fc(x.mean((2, 3)))


def run(digits, net, steps=60, *, optimizer=None, until=None, autocast=False, spoil=(), each=None, **options):
    """A loop of one's own; returns the pruner, the optimizer and the losses."""
    images, labels = digits
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    options = {"target": "macs", "update_every": 5, "config": CONFIG, **options}
    pruner = HybridPruner(
        net, options.pop("config"), None, steps, optimizer=optimizer, dummy_input=images[:1], **options
    )
    losses = []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if autocast else None
    net.train()
    for step in range(until or steps):
        at = step * 32 % 1700
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(images[at : at + 32])
        loss = nn.functional.cross_entropy(output.float(), labels[at : at + 32])
        spoiled = loss * torch.inf if step in spoil else loss
        if scaler is None:
            spoiled.backward()
            optimizer.step()
        else:
            scaler.scale(spoiled).backward()
            scaler.step(optimizer)
            scaler.update()
        pruner.step()
        losses.append(loss.item())
        if each is not None:
            each(step + 1, pruner)
    return pruner, optimizer, losses


class Heads(nn.Module):
    """Four heads, each an eighth of all MACs, and 48 hidden units."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.embed, self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc((x + self.down(self.up(x).relu())).mean(1))


@pytest.mark.parametrize("compact", [0.0, 0.1])
def test_no_step_of_the_ramp_takes_a_coarse_unit_that_the_budget_has_no_room_for(digits, compact, caplog):
    net = Heads()
    graph = ChannelGraph.watch(net, digits[0][:1])
    dense = graph.cost().macs
    asked = 1 - graph.cost({"up": 5}).macs / dense + 0.018  # a little more than all hidden units that may go
    config = [{"op_names": ["attention", "up"], "sparse_ratio": asked}]
    pruner, _, _ = run(digits, net, config=config, compact=compact)
    assert 1 - pruner.plan.cost().macs / dense == pytest.approx(asked, abs=0.02)
    assert not caplog.messages
    run(digits, Heads(), config=[{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.2}], compact=compact)
    assert "sparsity 0.2 of macs was asked; channels are coarse, and 0.2" in caplog.text


def test_layers_that_do_not_train_exchange_nothing(digits):
    """One is frozen: what it dropped would come back as 0. One has no part in the forward, so no gradient."""
    net = small()
    net[3].requires_grad_(False)
    net.spare = nn.Linear(24, 24)
    net.forward = lambda x: net[:12](x)
    before, spare = net[3].weight.clone(), net.spare.weight.clone()
    config = [{"op_types": ["Conv2d", "Linear"], "op_names": ["0", "3", "spare"], "sparse_ratio": 0.5}]
    pruner, _, _ = run(digits, net, config=config, compact=0, density=0.2)
    assert pruner.updates > 5
    for name, weight, was in (("3", net[3].weight, before), ("spare", net.spare.weight, spare)):
        mask = pruner.get_masks()[name]["weight"]
        assert torch.equal(weight, was * mask)  # not one was dropped and grew again, at 0
        assert 0 < int(mask.sum()) < mask.numel()


def test_tied_weights_shrink_as_one(digits):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.into, self.mid = nn.Linear(64, 24, bias=False), nn.Linear(24, 24)
            self.again, self.fc = nn.Linear(64, 24, bias=False), nn.Linear(24, 10)
            self.again.weight = self.into.weight

        def forward(self, x):
            x = x.flatten(1)
            return self.fc((self.mid(self.into(x).relu()) + self.again(x)).relu())

    net = Tied()
    pruner, _, losses = run(digits, net, config=[{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert pruner.compactions > 1
    assert net.again.weight is net.into.weight
    assert len(net.into.weight) < 16
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compact", [0.0, 0.1])
@pytest.mark.parametrize("make", [small, Residual])
def test_the_budget_is_met_by_channels_and_the_density_by_weights(digits, make, compact):
    net = make()
    dense = ChannelGraph.watch(net, digits[0][:1]).cost().macs
    pruner, _, _ = run(digits, net, compact=compact)
    net.eval()
    if not compact:
        assert pruner.compactions == 0
        ModelSpeedup(net, digits[0][:1], pruner.get_masks()).speedup_model()
    left = ChannelGraph.watch(net, digits[0][:1]).cost().macs / dense
    assert left == pytest.approx(0.5, abs=0.03 if make is small else 0.06)  # a channel of the residual is an eighth
    convolutions = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    active = sum(int((w != 0).sum()) for w in convolutions) / sum(w.numel() for w in convolutions)
    assert active == pytest.approx(0.5, abs=0.01)
    assert pruner.finished
    assert pruner.updates == 8  # every 5 steps in 3/4 of 60


def test_taking_channels_out_changes_nothing_in_the_training_that_follows(digits):
    """Beside a copy that keeps its dead channels as zeros: the same losses, momentum included."""
    images, labels = digits
    net = small()
    pruner, optimizer, _ = run(digits, net, steps=40, density=1.0, compact=0.0)
    other, other_optimizer = copy.deepcopy((net, optimizer))
    masks = {name: mask for targets in [pruner.get_masks()] for m, t in targets.items() for p, mask in t.items()
             for name in [f"{m}.{p}"] if mask is not None}  # fmt: skip
    before = sum(p.numel() for p in net.parameters())
    same = [id(p) for p in net.parameters()]
    pruner.compact()
    assert sum(p.numel() for p in net.parameters()) < 0.7 * before
    assert [id(p) for p in net.parameters()] == same
    for parameter in net.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    for model, trainer in ((net, optimizer), (other, other_optimizer)):
        model.train()
        losses = []
        for step in range(6):
            trainer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[step * 32 :][:32]), labels[step * 32 :][:32])
            loss.backward()
            trainer.step()
            losses.append(loss.item())
            if model is other:
                with torch.no_grad():
                    for name, mask in masks.items():
                        other.get_parameter(name).mul_(mask)
        if model is net:
            wanted = losses
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_channels_leave_along_a_ramp_and_never_come_back(digits):
    seen = []

    def each(step, pruner):
        seen.append((step, pruner.graph.cost(pruner.plan.counts).macs))

    run(digits, small(), compact=0.1, each=each)
    macs = [value for _, value in seen]
    assert all(later <= earlier for earlier, later in itertools.pairwise(macs))
    assert len(set(macs)) > 8
    quarter = next(value for step, value in seen if step == 12)
    assert (macs[0] - quarter) / (macs[0] - macs[-1]) > 0.4  # cubic: most goes early


def test_more_weights_are_active_while_exploring(digits):
    densities = []

    def each(step, pruner):
        layers = pruner._layers().values()
        alive = sum(int(region(layer.weight, layer.alive).sum()) for layer in layers)
        active = sum(int(layer.active.sum()) for layer in layers)
        densities.append(active / alive)  # a weight that has just grown is 0, and active

    run(digits, small(), steps=100, density=0.4, over_density=0.1, each=each)
    assert densities[49] == pytest.approx(0.5, abs=0.03)
    assert densities[-1] == pytest.approx(0.4, abs=0.01)


def test_the_pattern_holds_in_the_model_as_it_is_at_the_end(digits):
    net = small()
    pruner, _, _ = run(digits, net, density=1.0, pattern="2:4", compact=0.1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 1:
            assert Pattern(2, 4).holds(module.weight)
            assert (module.weight != 0).float().mean() > 0.4
    assert pruner.compactions > 0


def test_averages_and_schedules_follow(digits):
    net = small()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)

    def each(step, pruner):
        average.update_parameters(net)
        schedule.step()

    pruner, _, _ = run(digits, net, optimizer=optimizer, averages=[average], each=each)
    assert pruner.compactions > 1
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in net.parameters()]
    assert average.module(digits[0][:2]).isfinite().all()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.99**60)
    assert all(optimizer.state[p]["exp_avg_sq"].shape == p.shape for p in net.parameters())


def test_the_compact_model_is_saved_and_loaded(digits, tmp_path):
    net = small()
    run(digits, net)
    save_compact(net, tmp_path / "net.safetensors")
    loaded = load_compact(tmp_path / "net.safetensors", small)
    net.eval()
    loaded.eval()
    assert torch.equal(loaded(digits[0][:4]), net(digits[0][:4]))


def test_nothing_is_wrapped_and_what_is_masked_is_zero(digits):
    net = small()

    def each(step, pruner):
        assert not any("_nni_wrapper" in name for name, _ in net.named_modules())
        for module, targets in pruner.get_masks().items():
            for name, mask in targets.items():
                if mask is not None:
                    assert bool((net.get_submodule(module).get_parameter(name)[mask == 0] == 0).all())

    run(digits, net, each=each)


def test_it_goes_on_after_the_end_where_that_is_asked_for(digits):
    images, labels = digits
    for lasting, more in ((0.0, 0), (0.1, 4)):
        net = small()
        pruner, optimizer, _ = run(digits, net, lasting=lasting)
        updates, shapes = pruner.updates, [p.shape for p in net.parameters()]
        for step in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[step * 32 :][:32]), labels[step * 32 :][:32]).backward()
            optimizer.step()
            pruner.step()
        assert pruner.updates - updates == more
        assert [p.shape for p in net.parameters()] == shapes
        layers = pruner._layers().values()
        active = sum(int(layer.active.sum()) for layer in layers)
        assert active / sum(layer.weight.numel() for layer in layers) == pytest.approx(0.5, abs=0.01)


def test_a_step_that_is_not_finite_is_left_out(digits):
    net = small()
    pruner, _, _ = run(digits, net, autocast=True, spoil=(4, 9, 21))
    assert all(p.isfinite().all() for p in net.parameters())
    assert pruner.updates == 6


def test_gradients_that_are_not_finite_exchange_nothing_in_any_layer(digits):
    """Also where only those of the last layer are not."""
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    pruner = HybridPruner(net, CONFIG, None, 500, optimizer=optimizer, dummy_input=digits[0][:1], update_every=1)
    masks = []
    for spoilt in (False, True):
        optimizer.zero_grad()
        net(digits[0][:32]).square().mean().backward()
        if spoilt:
            net[7].weight.grad[0, 0, 0, 0] = torch.inf
        else:
            optimizer.step()
        pruner.step()
        masks.append(pruner.get_masks()["3"]["weight"])
    assert pruner.updates == 1
    assert torch.equal(*masks)


def test_what_the_proof_puts_back_is_not_tried_again_and_again(digits):
    """Channels of ``first`` that are gone would change the output: a forward counts them."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.fc = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

        def forward(self, x):
            x = self.first(x).relu()
            x = self.second(x / torch.full_like(x, x.shape[1])).relu()
            return self.fc(x.mean((2, 3)))

    net = Counting()
    pruner, _, losses = run(digits, net, density=1.0, target="channels")
    assert net.first.out_channels == 16
    assert net.second.out_channels < 16
    assert 1 <= pruner.compactions <= 8
    assert losses[-1] < losses[0]


def test_heads_go_on_leaving_after_a_compaction(digits):
    """Attention is selected by its type, also when a forward of flexible width has taken the place of its own."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Conv2d(1, 24, 2, 2), nn.LayerNorm(24)
            self.attention = nn.MultiheadAttention(24, 12, batch_first=True)
            self.fc = nn.Linear(24, 10)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            y = self.norm(x)
            return self.fc((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))

    net, heads = Attending(), []
    config = [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.75}]
    run(digits, net, config=config, target="channels", each=lambda *_: heads.append(net.attention.num_heads))
    assert heads[-1] == 3
    assert len(set(heads)) > 3


@pytest.mark.parametrize("compact", [0.0, 0.1])
def test_an_evaluator_trains_it_and_it_resumes_bit_for_bit(digits, tmp_path, compact):
    def make(model, evaluator):
        return HybridPruner(model, CONFIG, evaluator, 40, target="macs", update_every=5, compact=compact)

    assert_resumes(small, make, digits, tmp_path / "state.pt", at=23)


def test_lightning(digits, tmp_path):
    model, evaluator = lightning(digits, tmp_path)
    pruner = HybridPruner(model, CONFIG, evaluator, target="macs", dummy_input=digits[0][:1], update_every=10)
    pruner.compress()
    assert (pruner._total, pruner._step) == (57, 57)
    assert pruner.compactions > 0
    assert model.conv1.out_channels < 8 or model.conv2.out_channels < 16


def test_transformers(tmp_path):
    model, evaluator = transformers(tmp_path)
    before = model.bert.encoder.layer[0].intermediate.dense.out_features
    config = [{"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}]
    dummy = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    pruner = HybridPruner(model, config, evaluator, dummy_input=dummy, update_every=5)
    pruner.compress()
    assert (pruner._total, pruner._step) == (24, 24)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == before // 2


def test_it_fuses_with_a_distiller_and_then_leaves_compaction_to_the_speedup(digits, make_evaluator):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    net, teacher = small(), small(1)
    evaluator = make_evaluator(net)
    config = [{"op_names": ["11"], "link": "11", "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller(net, config, evaluator, teacher, lambda batch, model: model(batch[0]))
    pruner = HybridPruner.from_compressor(distiller, CONFIG, 30, target="macs", update_every=5)
    _, masks = pruner.compress(30, None)
    pruner.unwrap_model()
    assert pruner.compactions == 0
    assert pruner.finished
    speedup = ModelSpeedup(net, digits[0][:1], masks)
    speedup.speedup_model()
    assert speedup.report.macs_after / speedup.report.macs_before == pytest.approx(0.5, abs=0.05)


def test_copies_and_masks_of_a_live_compaction(digits):
    net = small()
    twin = copy.deepcopy(net)
    graph = ChannelGraph.watch(net, digits[0][:1])
    plan = Plan(graph, {graph.groups[0].name: [0, 2, 5]})
    mask = torch.arange(net[3].weight.numel()).view_as(net[3].weight) % 7
    smaller = compact_live(net, digits[0][:1], plan, copies=[twin], masks={"3.weight": mask, "0.weight": None})
    assert torch.equal(smaller["3.weight"], mask[:, [0, 2, 5]])
    assert smaller["0.weight"] is None
    assert net[0].weight.shape == twin[0].weight.shape == (3, 1, 3, 3)


def test_a_mask_is_fitted_within_what_is_alive():
    weight = torch.arange(1.0, 25.0).view(4, 6)
    inside = region(weight, {0: torch.tensor([0, 2]), 1: torch.tensor([1, 2, 4, 5])})
    assert int(inside.sum()) == 8
    mask = fitted(weight, torch.ones_like(weight), 3, inside)
    assert sorted(weight[mask].tolist()) == [15.0, 17.0, 18.0]
    grown = fitted(weight, mask, 5, inside, gradient=-weight.flip(0))
    assert sorted(weight[grown].tolist()) == [5.0, 6.0, 15.0, 17.0, 18.0]
    alive = {0: torch.tensor([0, 2]), 1: torch.tensor([1, 2, 4, 5])}
    found = patterned(Layer(weight, inside, alive, (1, 1)), 100, Pattern(2, 4))
    assert sorted(weight[found].tolist()) == [5.0, 6.0, 17.0, 18.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "how long training lasts is not known"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"density": 0.0}, "density is 0.0"),
        ({"compact": 2}, "compact is 2"),
        ({"pattern": "2-4"}, "pattern is '2-4'"),
        ({"pattern": "2:4", "lasting": 0.1}, "pattern 2:4 is made at the end"),
        ({"config_list": [{"op_types": ["Conv3d"], "sparse_ratio": 0.5}]}, "config_list"),
    ],
)
def test_mistakes_are_named_in_one_line(digits, options, message):
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given = {"config_list": CONFIG, "total_steps": 10, "optimizer": optimizer, "dummy_input": digits[0][:1], **options}
    with pytest.raises(PruningError, match=message):
        HybridPruner(net, **given)


def test_what_cannot_be_met_or_done_is_said_at_once(digits, make_evaluator):
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.95, "max_sparse_ratio": 0.3}]
    with pytest.raises(BudgetError):
        HybridPruner(net, config, None, 10, optimizer=optimizer, dummy_input=digits[0][:1], target="macs")
    with pytest.raises(PruningError, match="not both"):
        HybridPruner(net, CONFIG, make_evaluator(net), 10, optimizer=optimizer)
    with pytest.raises(PruningError, match="step\\(\\) is for a training loop"):
        HybridPruner(net, CONFIG, make_evaluator(net), 10).step()
    pruner = HybridPruner(net, CONFIG, None, 10, optimizer=optimizer, dummy_input=digits[0][:1], update_every=1)
    with pytest.raises(PruningError, match="has no gradient; call step"):
        pruner.step()
    with pytest.raises(PruningError, match="this is HybridPruner"):
        pruner.load_state_dict({**pruner.state_dict(), "pruner": "TaylorPruner"})


RANK = """
from nni_plugins.pruners import HybridPruner

net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
model = nn.parallel.DistributedDataParallel(net)
data = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(10 + rank))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
pruner = HybridPruner(net, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], None, 30, optimizer=optimizer,
                      dummy_input=torch.randn(1, 16), update_every=5)
for step in range(30):
    optimizer.zero_grad()
    (model(data[step]) - data[step][:, :4] * data[step][:, 4:8]).square().mean().backward()
    optimizer.step()
    pruner.step()
masks, live = pruner.get_masks(), pruner.compactions
del model
pruner.compact()
result = (masks, [p.detach() for p in net.parameters()], pruner.updates, live)
"""


@needs_gloo
def test_two_processes_choose_alike_and_compact_between_trainings(tmp_path):
    (masks, weights, updates, live), (other, others, _, _) = on_two_ranks(RANK, tmp_path)
    assert (updates, live) == (4, 0)
    assert weights[0].shape[0] < 32
    for module, targets in masks.items():
        for name, mask in targets.items():
            assert (mask is None and other[module][name] is None) or torch.equal(mask, other[module][name])
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
