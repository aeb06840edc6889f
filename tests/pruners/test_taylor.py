import copy

import numpy as np
import pytest
import torch
from torch import nn

from nni_plugins.pruners import PruningError, TaylorPruner

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def small(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Skip(nn.Module):
    """A stream with two producers, each under its norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.n0 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.n1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = self.n0(self.stem(x)).relu()
        return self.fc((x + self.n1(self.conv(x))).relu().mean((2, 3)))


def batches(digits, count, size=64):
    images, labels = digits
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(count)]


def loss_of(net, batch):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def pruned(net, make_evaluator, steps=3, rate=1e-12, **kwargs):
    pruner = TaylorPruner(net, CONFIG, make_evaluator(net, rate=rate), steps, **kwargs)
    pruner.compress()
    return pruner


def test_weight_variant_squares_each_element_then_sums(digits, make_evaluator):
    net = small()
    reference, expected = copy.deepcopy(net).train(), torch.zeros(6, dtype=torch.float64)
    for batch in batches(digits, 3):
        reference.zero_grad()
        loss_of(reference, batch).backward()
        for parameter, dim in (("0.weight", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)):
            value = reference.get_parameter(parameter)
            squares = (value * value.grad).detach().double() ** 2
            expected += squares.movedim(dim, 0).reshape(6, -1).sum(1) / 3
    pruner = pruned(net, make_evaluator)
    torch.testing.assert_close(pruner.scores["0"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_gate_variant_is_the_derivative_of_a_gate_after_the_norm(norm, digits, make_evaluator):
    net = small(norm)
    reference, gate = copy.deepcopy(net).train(), torch.ones(6, requires_grad=True)
    reference[1].register_forward_hook(lambda _m, _i, output: output * gate[:, None, None])
    expected = torch.zeros(6)
    for batch in batches(digits, 3):
        (gradient,) = torch.autograd.grad(loss_of(reference, batch), gate)
        expected += gradient**2 / 3
    pruner = pruned(net, make_evaluator, variant="gate")
    torch.testing.assert_close(pruner.scores["0"], expected.double(), rtol=1e-3, atol=1e-12)


def test_a_gate_on_a_skip_is_divided_by_the_number_of_its_producers(digits, make_evaluator):
    net = Skip()
    reference, gate = copy.deepcopy(net).train(), torch.ones(6, requires_grad=True)
    for norm in (reference.n0, reference.n1):
        norm.register_forward_hook(lambda _m, _i, output: output * gate[:, None, None])
    expected = torch.zeros(6)
    for batch in batches(digits, 3):
        (gradient,) = torch.autograd.grad(loss_of(reference, batch), gate)
        expected += (gradient / 2) ** 2 / 3
    pruner = pruned(net, make_evaluator, variant="gate")
    assert list(pruner.scores) == ["stem"]
    torch.testing.assert_close(pruner.scores["stem"], expected.double(), rtol=1e-3, atol=1e-12)


def test_second_order_of_a_gate_uses_its_curvature(digits, make_evaluator):
    """With many probes the Hutchinson estimate nears the exact diagonal of the gates' Hessian."""
    net = small(norm=False)
    reference, gate = copy.deepcopy(net).train(), torch.ones(6, requires_grad=True)
    reference[1].register_forward_hook(lambda _m, _i, output: output * gate[:, None, None])
    first, square, curvature = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    for batch in batches(digits, 2):
        (gradient,) = torch.autograd.grad(loss_of(reference, batch), gate, create_graph=True)
        rows = [torch.autograd.grad(g, gate, retain_graph=True)[0][i] for i, g in enumerate(gradient)]
        curvature += torch.stack(rows) / 2
        first += gradient.detach() / 2
        square += gradient.detach() ** 2 / 2
    expected = square - first * curvature + curvature**2 / 4
    pruner = pruned(net, make_evaluator, steps=2, variant="gate", order=2, probes=400)
    torch.testing.assert_close(pruner.scores["0"], expected.double(), rtol=0.15, atol=0.02 * float(expected.max()))


def test_second_order_of_weights_is_exact_where_the_hessian_is_diagonal(make_evaluator):
    """For L = ½Σ h·w² the Hessian is diagonal, so that one probe is exact: (−w·hw + ½w²·h)² = (½h·w²)²."""
    from nni_plugins.pruners.gradients import WeightGradients

    weight, h = torch.randn(5, requires_grad=True), torch.rand(5)

    def signs():
        return {"w": torch.randint(0, 2, (5,)).float() * 2 - 1}

    collector = WeightGradients({"w": weight}, dict, signs)
    for _ in range(3):
        collector._differentiate_twice((h * weight**2).sum() / 2, None)
        collector.end_of_minibatch()
    torch.testing.assert_close(collector.moments.importance()["w"], ((h * weight**2) / 2).detach() ** 2)


def test_activation_variant_averages_over_examples_and_normalises_per_layer(digits, make_evaluator):
    net = small()
    reference, seen = copy.deepcopy(net).train(), {}

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen["output"] = output
        return output.clone()  # the activation that follows works in place

    reference[1].register_forward_hook(keep)
    expected = torch.zeros(6)
    for batch in batches(digits, 3):
        loss_of(reference, batch).backward()
        product = seen["output"].detach() * seen["output"].grad
        expected += (product.mean((2, 3)).abs().mean(0)) ** 2 / 3
    pruner = pruned(net, make_evaluator, variant="activation")
    assert float(pruner.scores["0"].norm()) == pytest.approx(1.0, rel=1e-5)
    order = np.argsort(expected.numpy())
    assert np.argsort(pruner.scores["0"].numpy()).tolist() == order.tolist()


class Kinds(nn.Module):
    """Layers whose output has its channels in a place of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(1, 12, 3, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 10, 3))
        self.two, self.fc = nn.Bilinear(10, 10, 14), nn.Linear(14, 10)

    def forward(self, x):
        x = self.normed(self.up(x).relu()).relu().mean((2, 3))
        return self.fc(self.two(x, x).relu())


def test_activation_variant_finds_the_channels_of_any_layer(digits, make_evaluator):
    kinds = [{"op_types": ["ConvTranspose2d", "ParametrizedConv2d", "Bilinear"], "sparse_ratio": 0.5}]
    net = Kinds()
    reference, expected = copy.deepcopy(net).train(), {}
    for name in ("up", "normed", "two"):
        reference.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: expected.update({n: o}))
    loss = loss_of(reference, next(iter(batches(digits, 1))))
    gradients = torch.autograd.grad(loss, list(expected.values()))
    pruner = TaylorPruner(net, kinds, make_evaluator(net), 1, variant="activation")
    pruner.compress()
    assert len(pruner.scores) == 3
    for gradient, (name, output) in zip(gradients, expected.items(), strict=True):
        own = (gradient * output).flatten(2).mean(2) if output.dim() > 2 else gradient * output
        score = next(s for n, s in pruner.scores.items() if n.startswith(name))
        assert torch.allclose(score, (own.abs().mean(0) / own.abs().mean(0).norm()).double(), rtol=1e-4)


def test_gradient_accumulation_counts_as_one_minibatch():
    from nni_plugins.pruners.gradients import WeightGradients

    weight = torch.tensor([2.0], requires_grad=True)
    collector = WeightGradients({"w": weight}, dict)
    hook = collector._hook("w")([])
    for gradient in (1.0, 3.0):
        hook(torch.tensor([gradient]))
    collector.end_of_minibatch()
    hook(torch.tensor([float("inf")]))  # a step that AMP skips
    collector.end_of_minibatch()
    assert collector.moments.count == 1
    assert collector.moments.importance()["w"].item() == 64.0  # (2·(1+3))²


def test_scores_are_averaged_between_prunings(digits, make_evaluator):
    net = small()
    seen = []

    class Watched(TaylorPruner):
        def _group_score(self, group, importance):
            score = super()._group_score(group, importance)
            if group.name == "0":
                seen.append(score)
            return score

    schedule = {"shape": "linear", "times": 2, "interval_steps": 2}
    pruner = Watched(net, CONFIG, make_evaluator(net), schedule=schedule, momentum=0.9)
    pruner.compress()
    assert len(seen) == 2
    torch.testing.assert_close(pruner.scores["0"], 0.9 * seen[0] + 0.1 * seen[1])


@pytest.mark.parametrize("kind", [{}, {"variant": "gate", "order": 2}, {"variant": "activation"}])
def test_only_the_last_minibatches_before_a_pruning_count(kind, digits, make_evaluator):
    """Of 6 steps between prunings, the last 2 are averaged; between them nothing is gathered."""
    net, counts, active = small(), [], []

    class Watched(TaylorPruner):
        def _scores(self):
            counts.append(self._collector.moments.count)
            return super()._scores()

        def _after_step(self):
            active.append(self._collector.active)
            super()._after_step()

    schedule = {"shape": "linear", "times": 2, "interval_steps": 6}
    Watched(net, CONFIG, make_evaluator(net), 2, schedule=schedule, **kind).compress(max_steps=14)
    assert counts == [2, 2]
    assert active == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2 + [False] * 2


def test_training_happens_once_for_the_asked_steps_and_seeds_repeat(make_evaluator):
    runs = []
    for _ in range(2):
        net = small()
        evaluator = make_evaluator(net)
        pruner = TaylorPruner(net, CONFIG, evaluator, 4, variant="gate", order=2, scope="global")
        pruner.compress()
        pruner.compress()
        assert evaluator.steps == [4]
        runs.append({name: units.tolist() for name, units in pruner.plan.kept.items()})
    assert runs[0] == runs[1]
    more = small()
    evaluator = make_evaluator(more)
    TaylorPruner(more, CONFIG, evaluator, 4).compress(max_steps=9)  # goes on training under its masks
    assert evaluator.steps == [9]


def test_too_short_a_training_still_gives_masks(make_evaluator, caplog):
    net = small()
    pruner = TaylorPruner(net, CONFIG, make_evaluator(net), 10)
    pruner.compress(max_steps=3)
    assert {name: len(units) for name, units in pruner.plan.kept.items()} == {"0": 3, "3": 4}
    assert "ended after 3 of 10 steps" in caplog.text


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.fc = nn.GRUCell(8, 6), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.cell(x.flatten(1)[:, :8]))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.fc(x.mean((1, 2)))


def test_what_it_cannot_do_is_said_in_one_line(make_evaluator):
    net = small()
    for kwargs, message in (
        ({"variant": "fisher"}, "variant is 'fisher'"),
        ({"variant": "activation", "order": 2}, "order is 2"),
        ({"order": 3}, "order is 3"),
        ({"training_steps": 0}, "training_steps is 0"),
        ({"training_steps": 2.5}, r"training_steps is 2\.5"),
        ({"momentum": 1.0}, r"momentum is 1\.0"),
        ({"momentum": "much"}, "momentum is 'much'"),
        ({"probes": True}, "probes is True"),
    ):
        with pytest.raises(PruningError, match=message):
            TaylorPruner(net, CONFIG, make_evaluator(net), **kwargs)
    with pytest.raises(PruningError, match="needs an evaluator"):
        TaylorPruner(net, CONFIG, None, dummy_input=torch.randn(1, 1, 8, 8))
    cells = Steps()
    with pytest.raises(PruningError, match=r"cell: no gradient of it was seen.*use variant='weight'"):
        TaylorPruner(cells, [{"op_types": ["GRUCell"], "sparse_ratio": 0.5}], make_evaluator(cells), 1,
                     variant="activation").compress()  # fmt: skip
    attending = Attending()
    with pytest.raises(PruningError, match=r"order=2 needs second derivatives.*use order=1, or train under.*MATH"):
        TaylorPruner(attending, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], make_evaluator(attending), 1,
                     order=2).compress()  # fmt: skip
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(PruningError, match="its norm has no scale"):
        TaylorPruner(bare, CONFIG, make_evaluator(bare), variant="gate")


def test_scores_agree_with_leaving_units_out(digits, make_evaluator):
    """On a trained net, Taylor scores rank units much as the loss does when each is left out."""
    net = small()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(12):
        for batch in batches(digits, 20):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
    net.eval()
    data = (digits[0][:1280], digits[1][:1280])
    with torch.no_grad():
        dense = float(loss_of(net, data))
        oracle = []
        for layer, size in ((1, 6), (3, 8)):
            for unit in range(size):
                keep = torch.ones(size)
                keep[unit] = 0
                handle = net[layer].register_forward_hook(lambda _m, _i, o, keep=keep: o * keep[:, None, None])
                oracle.append((float(loss_of(net, data)) - dense) ** 2)
                handle.remove()
    for variant in ("weight", "gate", "activation"):
        pruner = pruned(copy.deepcopy(net), make_evaluator, steps=20, variant=variant)
        scores = torch.cat([pruner.scores["0"], pruner.scores["3"]]).numpy()
        ranks = [np.argsort(np.argsort(values)) for values in (scores, oracle)]
        correlation = np.corrcoef(*ranks)[0, 1]
        assert correlation > 0.3, variant
