import nni
import pytest
import torch
import torch.utils.checkpoint
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import PruningError
from nni_plugins.pruners.dynamic import DynamicSparsePruner
from nni_plugins.pruners.patterns import Pattern
from nni_plugins.pruners.regrow import drop_and_grow, drop_fraction
from nni_plugins.pruners.weight_magnitude import MagnitudeWeightPruner

from .resuming import assert_resumes
from .trainers import lightning, transformers
from .two_ranks import needs_gloo, on_two_ranks

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def evaluator_of(
    net, digits, *, optimizer=None, batch=32, accumulate=1, scaler=None, autocast=False, spoil=(), watch=None
):
    """A TorchEvaluator on digits; ``spoil`` are steps whose loss is infinite, ``watch(step, model)`` sees each step."""
    images, labels = digits
    optimizer = optimizer or nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05, momentum=0.9)

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        part = batch // accumulate
        for step in range(max_steps):
            optimizer.zero_grad()
            for at in range(step * batch, (step + 1) * batch, part):
                at %= len(images) - batch
                loss = training_step((images[at : at + part], labels[at : at + part]), model) / accumulate
                if step in spoil:
                    loss = loss * torch.inf
                (loss if scaler is None else scaler.scale(loss)).backward()
            if watch:
                watch(step, model)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def training_step(batch, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    return TorchEvaluator(train, optimizer, training_step)


def trained(digits, net=None, steps=30, pruner=None, **options):
    net = net or small()
    keys = ("optimizer", "batch", "accumulate", "scaler", "autocast", "spoil", "watch")
    evaluator = evaluator_of(net, digits, **{k: options.pop(k) for k in keys if k in options})
    options.setdefault("update_every", 5)
    made = DynamicSparsePruner(net, options.pop("config", CONFIG), evaluator, **options)
    _, masks = made.compress(max_steps=steps)
    return made, {name: targets["weight"] for name, targets in masks.items() if "weight" in targets}


def test_rigl_is_what_a_plain_loop_makes_of_it(digits):
    """Weights and masks equal those of a loop in plain torch, to the last bit."""
    images, labels = digits
    pruner, masks = trained(digits)
    net = small()
    weights = {name: net.get_parameter(name) for name in ("0.weight", "2.weight")}
    held = {n: m.clone() for n, m in trained_start(digits).items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, 31):
        optimizer.zero_grad()
        at = (step - 1) * 32
        products = {n: w * held[n] for n, w in weights.items()}
        [product.retain_grad() for product in products.values()]
        output = torch.func.functional_call(net, products, (images[at : at + 32],))
        nn.functional.cross_entropy(output, labels[at : at + 32]).backward()
        optimizer.step()
        if step % 5 == 0 and step < int(0.75 * 30):
            for name, weight in weights.items():
                fraction = drop_fraction(step, int(0.75 * 30))
                new = drop_and_grow(weight, held[name], products[name].grad, fraction)
                grown = (new == 1) & (held[name] == 0)
                weight.data[grown] = 0
                optimizer.state[weight]["momentum_buffer"][grown] = 0
                held[name] = new
    for name, weight in weights.items():
        assert torch.equal(masks[name.split(".")[0]], held[name])
        assert torch.equal(pruner.parameters[name], weight)
    assert pruner.updates == 4
    assert pruner.finished


def trained_start(digits):
    net = small()
    pruner = MagnitudeWeightPruner(net, CONFIG, density="erk")
    pruner.compress()
    return pruner.weight_masks


@pytest.mark.parametrize("density", ["erk", "uniform", "global"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_number_of_weights_stays_all_the_way(digits, method, density):
    seen = []
    pruner, masks = trained(
        digits, method=method, density=density,
        watch=lambda _, m: seen.append([int(m[i]._nni_wrapper.weight_mask.sum()) for i in (0, 2)]),
    )  # fmt: skip
    assert {sum(counts) for counts in seen} == {sum(int(m.sum()) for m in masks.values())}
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert pruner.updates == 4
    assert pruner.explored > 0.21
    if density == "global":
        assert len({tuple(counts) for counts in seen}) > 1
    else:
        assert len({tuple(counts) for counts in seen}) == 1
        assert (masks["0"].mean() > 0.5) == (density == "erk")  # a thin layer


def test_dense_gradients_are_looked_at_in_update_steps_only(digits):
    hooked = []
    trained(digits, watch=lambda step, m: hooked.append(bool(m[2]._forward_hooks)))
    assert [step + 1 for step, on in enumerate(hooked) if on] == [5, 10, 15, 20]
    hooked.clear()
    trained(digits, method="set", watch=lambda step, m: hooked.append(bool(m[2]._forward_hooks)))
    assert not any(hooked)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_grown_weights_start_at_zero_with_no_memory(digits, kind):
    net = small()
    before, found = {}, []
    optimizer = nni.trace(kind)(net.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    class Watched(DynamicSparsePruner):
        def _update(self):
            before.update({n: m.clone() for n, m in self.weight_masks.items()})
            super()._update()
            for name, weight in self.parameters.items():
                grown = (self.weight_masks[name] == 1) & (before[name] == 0)
                (holder,) = self._optimizers.holding(weight)
                states = [v for v in holder.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]
                found.append(
                    (
                        int(grown.sum()),
                        float(weight.detach()[grown].abs().sum()),
                        [float(v[grown].abs().sum()) for v in states],
                    )
                )

    Watched(net, CONFIG, evaluator_of(net, digits, optimizer=optimizer), update_every=5).compress(max_steps=20)
    assert sum(grown for grown, _, _ in found) > 0
    assert all(value == 0 and states and not any(states) for _, value, states in found)


def test_gradient_accumulation_sees_all_parts_of_a_step(digits):
    _, whole = trained(digits)
    _, parts = trained(digits, accumulate=4)
    start = trained_start(digits)
    changed = (whole["2"] != start["2.weight"]).sum()
    assert changed > 20
    assert (whole["2"] != parts["2"]).sum() <= 0.1 * changed  # sums of floats in another order


def test_a_grad_scaler_changes_nothing(digits):
    _, plain = trained(digits)
    _, scaled = trained(digits, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_skipped_step_puts_the_update_off(digits, autocast):
    """The gradients of a step that the scaler skips are infinite; they must not choose."""
    updated = []

    class Watched(DynamicSparsePruner):
        def _update(self):
            super()._update()
            updated.append((self._step, self.updates))

    net = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # the fifth backward pass is skipped: it is not a step, and what it leaves behind spoils the fifth step
    evaluator = evaluator_of(net, digits, scaler=scaler, spoil=(4,), autocast=autocast)
    pruner = Watched(net, CONFIG, evaluator, total_steps=30, update_every=5)
    pruner.compress(max_steps=30)
    assert updated[:3] == [(5, 0), (6, 1), (10, 2)]
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert all(torch.isfinite(w).all() for w in pruner.parameters.values())


def test_the_pattern_holds_at_every_step(digits):
    held = []
    config = [{"op_names": ["2"], "sparse_ratio": 0.5}]
    pruner, _ = trained(
        digits, config=config, pattern="2:4", method="set",
        watch=lambda _, m: held.append(Pattern(2, 4).holds(m[2]._nni_wrapper.weight_mask)),
    )  # fmt: skip
    assert all(held)
    assert pruner.updates == 4
    assert pruner.explored > 0.55


def test_a_frozen_layer_exchanges_nothing(digits):
    net = small()
    net[2].requires_grad_(False)
    before = net[2].weight.clone()
    pruner, masks = trained(digits, net, method="set")
    assert pruner.updates == 4
    pruner.unwrap_model()
    assert torch.equal(net[2].weight * masks["2"], before * masks["2"])  # nothing grew at 0
    assert (masks["2"] == 1).sum() < before.numel()


def test_the_same_seed_gives_the_same_masks(digits):
    runs = [trained(digits, method="set", start="random", seed=seed)[1] for seed in (1, 1, 2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize(("at", "options"), [(9, {}), (10, {}), (12, {"method": "set", "density": "global"})])
def test_resuming(digits, tmp_path, at, options):
    make_pruner = lambda model, evaluator: DynamicSparsePruner(  # noqa: E731
        model, CONFIG, evaluator, total_steps=24, update_every=5, **options
    )
    assert_resumes(small, make_pruner, digits, tmp_path / "state.pt", at)


def test_what_an_earlier_pruner_removed_stays_removed(digits):
    net = small()
    first = MagnitudeWeightPruner(net, [{"op_names": ["2"], "sparse_ratio": 0.5}])
    _, before = first.compress()
    second = DynamicSparsePruner.from_compressor(
        first, CONFIG, evaluator=evaluator_of(net, digits), total_steps=30, update_every=5, method="set"
    )
    second.compress(max_steps=30)
    assert second.updates == 4
    after = second.get_masks()["2"]["weight"]
    assert (after <= before["2"]["weight"]).all()
    assert not torch.equal(after, before["2"]["weight"])


def test_it_fuses_with_a_distiller(digits):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    net, teacher = small(), small(1)
    evaluator = evaluator_of(net, digits)
    pruner = DynamicSparsePruner(net, CONFIG, evaluator, total_steps=20, update_every=5)
    config = [{"op_names": ["2"], "link": "2", "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller.from_compressor(pruner, config, teacher, lambda batch, model: model(batch[0]))
    distiller.compress(20, None)
    assert pruner.updates == 2
    assert pruner.finished
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)


def test_tied_weights_move_together(digits):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.out(self.second(self.first(x.flatten(1)).relu()).relu())

    net = Tied()
    config = [{"op_names": ["first", "second"], "sparse_ratio": 0.8}]
    pruner, masks = trained(digits, net, config=config)
    assert pruner.updates == 4
    assert torch.equal(masks["first"], masks["second"])
    assert masks["first"].mean() == pytest.approx(0.2, abs=0.01)
    pruner.unwrap_model()
    assert net.first.weight is net.second.weight


def test_itop_gives_weights_time_and_explores_to_the_end(digits):
    pruner, _ = trained(digits, method="itop", update_every=None, steps=40)
    assert (pruner._every, pruner.updates) == (2, 19)
    rigl, _ = trained(digits, steps=40, update_every=2)
    assert rigl.updates == 14


def test_how_long_training_lasts_must_be_known(digits):
    net = small()
    with pytest.raises(PruningError, match="how long training lasts is not known"):
        DynamicSparsePruner(net, CONFIG, evaluator_of(net, digits)).compress()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"method": "sett"}, "method is 'sett'"), ({"alpha": 1.5}, "alpha is 1.5"), ({"update_every": 0}, "update_every is 0"),
     ({"schedule": "cubic"}, "has no schedule"), ({"growth": "none"}, "growth is 'none'")],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(digits, kwargs, message):
    net = small()
    with pytest.raises(PruningError, match=message):
        DynamicSparsePruner(net, CONFIG, evaluator_of(net, digits), **kwargs)
    with pytest.raises(PruningError, match="needs an evaluator"):
        DynamicSparsePruner(net, CONFIG, None)


class Sequence(nn.Module):
    """Layers that read weights in odd ways: attention its projection, LSTM all of them, a head the embedding's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(17, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.rnn, self.out = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        tokens = (x.flatten(1)[:, :16] * 4).long().clamp(-8, 8) + 8
        hidden = torch.utils.checkpoint.checkpoint(self.layer, self.embed(tokens), use_reentrant=False)
        hidden = self.rnn(hidden)[0] + nn.functional.linear(self.embed(tokens), self.embed.weight[:16])
        return self.out(hidden.mean(1))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_layers_that_read_weights_in_odd_ways(digits, kind):
    net = Sequence().to(kind)
    names = ["embed", "layer.self_attn", "layer.self_attn.out_proj", "layer.linear1", "rnn"]
    config = [{"op_names": names, "sparse_ratio": 0.7}]
    pruner, _ = trained(digits, net, config=config)
    assert pruner.updates == 4
    assert pruner.sparsity == pytest.approx(0.7, abs=0.01)
    start = MagnitudeWeightPruner(Sequence().to(kind), config, density="erk")
    start.compress()
    for name, mask in pruner.weight_masks.items():
        assert not torch.equal(mask, start.weight_masks[name]), name  # a gradient has reached every one


RANK = """
from nni_plugins.pruners import DynamicSparsePruner, GradientWeightPruner, LotteryTicketPruner

data = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(10 + rank))

def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
    for step in range(max_steps):
        optimizer.zero_grad()
        training_step(data[step], model).backward()
        optimizer.step()

def training_step(batch, model):
    return (model(batch) - batch[:, :4] * batch[:, 4:8]).square().mean()

config = [{"op_types": ["Linear"], "sparse_ratio": 0.7}]
makers = {
    "rigl": lambda *given: DynamicSparsePruner(*given, update_every=5, density="global"),
    "set": lambda *given: DynamicSparsePruner(*given, update_every=5, method="set"),
    "gradient": lambda *given: GradientWeightPruner(*given, scope="global"),
    "lottery": lambda *given: LotteryTicketPruner(*given, rewind_step=2, rounds=2),
}
found = {}
for method, make in makers.items():
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
    pruner = make(model, config, TorchEvaluator(train, optimizer, training_step))
    _, masks = pruner.compress(max_steps=30)
    weights = getattr(pruner, "pruner", pruner).parameters
    found[method] = ({n: t["weight"] for n, t in masks.items()}, {n: p.detach() for n, p in weights.items()})
result = found
"""


@needs_gloo
def test_two_processes_choose_alike(tmp_path):
    ours, theirs = on_two_ranks(RANK, tmp_path)
    assert list(ours) == ["rigl", "set", "gradient", "lottery"]
    for method, (masks, weights) in ours.items():
        other, others = theirs[method]
        left = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        assert left == pytest.approx(0.3, abs=0.01)
        assert all(torch.equal(masks[name], other[name]) for name in masks), method
        assert all(torch.equal(weights[name], others[name]) for name in weights), method


def test_lightning_says_how_long_it_trains(digits, tmp_path):
    model, evaluator = lightning(digits, tmp_path)
    pruner = DynamicSparsePruner(model, CONFIG, evaluator, update_every=10)
    pruner.compress()
    assert (pruner._total, pruner._step, pruner.updates) == (57, 57, 4)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert pruner.explored > 0.21


def test_transformers_says_how_long_it_trains(tmp_path):
    model, evaluator = transformers(tmp_path)
    config = [{"op_names_re": [r".*(query|intermediate\.dense)"], "sparse_ratio": 0.5}]
    pruner = DynamicSparsePruner(model, config, evaluator, update_every=5)
    pruner.compress()
    assert (pruner._total, pruner._step, pruner.updates) == (24, 24, 3)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    assert pruner.explored > 0.51
