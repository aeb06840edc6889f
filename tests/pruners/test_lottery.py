import copy
import itertools

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import PruningError
from nni_plugins.pruners.lottery import LotteryTicketPruner
from nni_plugins.speedup import ModelSpeedup

from .trainers import lightning, transformers

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.6}]
STEPS, K = 12, 3


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def state_of(model):
    """Weights and buffers by their names in the plain model, masked where they are."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        module, _, own = name.rpartition(".")
        wrapper = getattr(model.get_submodule(module), "_nni_wrapper", None)
        if own.endswith("_mask") or (wrapper is not None and own in wrapper.pruning_target_spaces):
            continue
        mask = getattr(model.get_submodule(module), f"{own}_mask", None)
        found[name.replace("_nni_wrapper.", "")] = tensor.detach().clone() * (1 if mask is None else mask)
    return found


def make(digits, *, schedule="known", kind=torch.optim.SGD, **options):
    """A pruner, and for each training a list of what was seen just before each optimizer step."""
    images, labels = digits
    net, trainings = small(), []

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        seen = []
        trainings.append(seen)
        for step in range(max_steps):
            if schedule == "hidden":
                optimizer.param_groups[0]["lr"] = 0.05 * 0.9**step
            start = state_of(model)
            at = step * 32
            optimizer.zero_grad()
            training_step((images[at : at + 32], labels[at : at + 32]), model).backward()
            memory = copy.deepcopy(list(optimizer.state.values()))
            seen.append((start, memory, optimizer.param_groups[0]["lr"]))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    def training_step(batch, model):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = nni.trace(kind)(net.parameters(), lr=0.05, **more)
    known = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9) if schedule == "known" else None
    evaluator = TorchEvaluator(train, optimizer, training_step, known, dummy_input=images[:2])
    options.setdefault("rewind_step", K)
    return LotteryTicketPruner(net, options.pop("config", CONFIG), evaluator, **options), trainings


def assert_same_memory(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_rewinding_restores_everything_bit_for_bit(digits, kind):
    pruner, trainings = make(digits, kind=kind)
    _, masks = pruner.compress(max_steps=STEPS)
    dense, *tickets = trainings
    weights, memory, rate = dense[K]  # before step K + 1
    assert [len(t) for t in trainings] == [STEPS] + [STEPS - K] * 5  # 0.8**5 < 0.4
    for ticket in tickets:
        start, now, first_rate = ticket[0]
        for name, value in weights.items():
            module, _, own = name.rpartition(".")
            mask = masks.get(module, {}).get(own)
            if mask is None:
                assert torch.equal(start[name], value), name  # biases, norms, their statistics, counts
            else:
                kept = start[name] != 0
                assert torch.equal(start[name][kept], value[kept])
                assert kept.sum() >= mask.sum()
        assert_same_memory(now, memory)
        assert first_rate == rate
        assert [r for _, _, r in ticket] == [r for _, _, r in dense[K:]]
    assert pruner.pruner.sparsity == pytest.approx(0.6, abs=1e-3)
    assert pruner.finished


def test_each_round_removes_a_fifth_of_what_is_left(digits):
    pruner, trainings = make(digits)
    pruner.compress(max_steps=STEPS)
    names = ("0.weight", "3.weight")
    total = sum(trainings[0][0][0][n].numel() for n in names)
    left = [sum(int((t[0][0][n] != 0).sum()) for n in names) / total for t in trainings]
    assert left == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096, 0.4], abs=0.002)
    masks = [{n: t[0][0][n] != 0 for n in names} for t in trainings]
    for earlier, later in itertools.pairwise(masks):
        assert all((later[n] <= earlier[n]).all() for n in names)


def test_a_schedule_that_the_training_sets_itself_is_replayed(digits):
    pruner, trainings = make(digits, schedule="hidden", rounds=2)
    pruner.compress(max_steps=STEPS)
    assert [len(t) for t in trainings] == [STEPS] * 3
    weights, _, rate = trainings[0][K]
    for ticket in trainings[1:]:
        start, _, this_rate = ticket[K]
        assert this_rate == rate
        for name, value in weights.items():
            kept = start[name] != 0
            assert torch.equal(start[name][kept], value[kept])
            assert kept.all() or name in ("0.weight", "3.weight")


def test_a_constant_rate_needs_no_replay(digits):
    pruner, trainings = make(digits, schedule="none", rounds=1)
    pruner.compress(max_steps=STEPS)
    assert [len(t) for t in trainings] == [STEPS, STEPS - K]
    assert_same_memory(trainings[1][0][1], trainings[0][K][1])


def test_training_again_from_there_ends_where_it_did(digits):
    """With nothing removed, and the data in place, the second training repeats the first to the last bit."""
    pruner, _ = make(digits, schedule="hidden", config=[{"op_types": ["Conv2d"], "sparse_ratio": 0.0}])
    ended, prune = {}, pruner.prune
    pruner.prune = lambda fraction: (ended.update(state_of(pruner.bound_model)), prune(fraction))[1]
    pruner.compress(max_steps=STEPS)
    again = state_of(pruner.bound_model)
    assert ended
    assert all(torch.equal(ended[name], again[name]) for name in ended)


def test_learning_rate_rewinding_keeps_the_weights(digits):
    for schedule in ("known", "hidden"):
        pruner, trainings = make(digits, schedule=schedule, rewind="learning_rate", rounds=1)
        ended = {}
        prune = pruner.prune
        pruner.prune = lambda fraction, p=pruner, e=ended, f=prune: (e.update(state_of(p.bound_model)), f(fraction))[1]
        pruner.compress(max_steps=STEPS)
        begin = K if schedule == "hidden" else 0
        start, memory, rate = trainings[1][begin]
        for name, value in ended.items():
            kept = start[name] != 0
            assert torch.equal(start[name][kept], value[kept]), name
        assert rate == trainings[0][K][2]
        assert len(trainings[1]) == STEPS - K + begin
        if schedule == "known":
            assert memory == [] or not any(v.any() for s in memory for v in s.values() if torch.is_tensor(v))


def test_without_rewinding_training_goes_on_from_where_it_is(digits):
    pruner, trainings = make(digits, rewind=None, rounds=1)
    pruner.compress(max_steps=STEPS)
    assert [len(t) for t in trainings] == [STEPS, STEPS]
    assert trainings[1][0][2] == 0.05
    assert not torch.equal(trainings[1][0][0]["7.bias"], trainings[0][K][0]["7.bias"])


def test_rewinding_to_the_start_needs_no_snapshot_of_optimizers(digits):
    pruner, trainings = make(digits, rewind_step=0, rounds=1)
    pruner.compress(max_steps=STEPS)
    assert [len(t) for t in trainings] == [STEPS, STEPS]
    start, memory, rate = trainings[1][0]
    assert (memory, rate) == ([], 0.05)
    for name, value in trainings[0][0][0].items():
        kept = start[name] != 0
        assert torch.equal(start[name][kept], value[kept]) or name.endswith("weight")


def test_groups_become_a_smaller_model(digits):
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner, trainings = make(digits, by="groups", config=config, rounds=2)
    model, masks = pruner.compress(max_steps=STEPS)
    model.eval()
    x = digits[0][:4]
    masked = model(x)
    pruner.unwrap_model()
    compact = ModelSpeedup(pruner.bound_model, x, masks).speedup_model()
    torch.testing.assert_close(compact(x), masked, rtol=0, atol=1e-5)
    assert compact[0].out_channels + compact[3].out_channels == 12
    start, _, _ = trainings[2][0]
    norm = trainings[0][K][0]["1.running_mean"]
    kept = start["1.weight"] != 0
    assert torch.equal(start["1.running_mean"], norm)
    assert kept.sum() == compact[0].out_channels


def test_lightning_goes_back_too(digits, tmp_path):
    model, evaluator = lightning(digits, tmp_path, schedule=True)
    rounds = []
    pruner = LotteryTicketPruner(model, CONFIG, evaluator, rewind_step=10, rounds=2)
    give = pruner._snapshot.give_tensors
    pruner._snapshot.give_tensors = lambda m: (rounds.append(len(model.rates)), give(m))[1]
    pruner.compress()
    rates = [0.05 * 0.9**step for step in range(57)]
    assert rounds == [57, 104]
    assert model.rates[:57] == pytest.approx(rates)
    # the rate is given back just before a step is made, so the first reads the trainer's own
    assert model.rates[58:104] == pytest.approx(rates[11:])
    assert pruner.pruner.sparsity == pytest.approx(0.6, abs=0.01)
    assert pruner._length == 57


def test_transformers_goes_back_on_its_own_schedule(tmp_path):
    model, evaluator = transformers(tmp_path, max_steps=12)
    rates = []
    config = [{"op_names_re": [r".*(query|intermediate\.dense)"], "sparse_ratio": 0.5}]
    pruner = LotteryTicketPruner(model, config, evaluator, rewind_step=4, rounds=1)
    after = pruner._after_step
    pruner._after_step = lambda: (rates.append(evaluator.trainer.optimizer.param_groups[0]["lr"]), after())[1]
    pruner.compress()
    assert rates[:12] == pytest.approx([1e-2 * (1 - step / 12) for step in range(12)])
    assert rates[12:] == pytest.approx(rates[4:12])
    assert pruner.pruner.sparsity == pytest.approx(0.5, abs=0.01)


class Cut(Exception):
    pass


@pytest.mark.parametrize("cut", [(0, 2), (0, K), (0, 7), (1, 2), (2, 5)])
@pytest.mark.parametrize("by", ["weights", "groups"])
def test_a_run_that_is_cut_goes_on(digits, tmp_path, cut, by):
    """Cut in some round after some step, and resumed in a new process: the same weights and masks to the last bit."""
    images, labels = digits

    def run(cut_at=None, resume=None):
        net, held = small(), {"training": -1 if resume is None else resume["training"] - 1, "resume": resume}

        def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
            held["training"] += 1
            begin, state = 0, held.pop("resume", None)
            if state is not None:
                begin = state["step"]
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                scheduler.load_state_dict(state["scheduler"])
            for step in range(begin, begin + max_steps):
                optimizer.zero_grad()
                training_step(
                    (images[step * 32 : step * 32 + 32], labels[step * 32 : step * 32 + 32]), model
                ).backward()
                optimizer.step()
                scheduler.step()
                if (held["training"], step + 1) == cut_at:
                    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "pruner": held["pruner"]}
                    saved = {name: part.state_dict() for name, part in parts.items()}
                    torch.save({**saved, "step": step + 1, "training": held["training"]}, tmp_path / "state.pt")
                    raise Cut

        def training_step(batch, model):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05, momentum=0.9)
        scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9)
        evaluator = TorchEvaluator(train, optimizer, training_step, scheduler, dummy_input=images[:2])
        pruner = held["pruner"] = LotteryTicketPruner(net, CONFIG, evaluator, STEPS, by=by, rewind_step=K, rounds=2)
        if resume is not None:
            pruner.load_state_dict(resume["pruner"])
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return net.state_dict(), masks

    weights, masks = run()
    with pytest.raises(Cut):
        run(cut_at=cut)
    resumed, others = run(resume=torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert all(torch.equal(masks[m][t], others[m][t]) for m in masks for t in masks[m])


def test_it_says_that_it_cannot_be_fused(digits):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    from nni_plugins.pruners.weight_magnitude import MagnitudeWeightPruner

    pruner, _ = make(digits)
    config = [{"op_names": ["3"], "link": "3", "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller.from_compressor(
        pruner, config, small(1), lambda batch, model: model(batch[0])
    )
    with pytest.raises(PruningError, match="trains several times and cannot be fused"):
        distiller.compress(20, None)
    net = small()
    first = MagnitudeWeightPruner(net, CONFIG)
    with pytest.raises(PruningError, match="cannot be fused"):
        LotteryTicketPruner.from_compressor(first, CONFIG, evaluator=pruner.evaluator)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"by": "rows"}, "by is 'rows'"), ({"rewind": "all"}, "rewind is 'all'"), ({"rewind_step": -1}, "rewind_step is -1"),
     ({"fraction": 1.0}, "fraction is 1.0"), ({"rounds": 0}, "rounds is 0"),
     ({"total_steps": 3}, "a training has 3 steps")],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(digits, kwargs, message):
    with pytest.raises(PruningError, match=message):
        make(digits, **kwargs)


def test_how_long_a_training_lasts_must_be_known(digits):
    pruner, _ = make(digits)
    with pytest.raises(PruningError, match="how long a training lasts is not known"):
        pruner.compress()
    with pytest.raises(PruningError, match="a training has 2 steps"):
        pruner.compress(max_steps=2)


def test_epochs_are_counted_in_the_first_training(digits):
    images, labels = digits
    net, lengths = small(), []

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        done = 0
        for _ in range(max_epochs or 1):  # what is given in epochs must not be cut to one by a number of steps
            for at in range(0, 160, 32):
                if max_steps is not None and done >= max_steps:
                    break
                optimizer.zero_grad()
                training_step((images[at : at + 32], labels[at : at + 32]), model).backward()
                optimizer.step()
                done += 1
        lengths.append(done)

    def training_step(batch, model):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05), training_step)
    LotteryTicketPruner(net, CONFIG, evaluator, rewind_step=K, rounds=2).compress(max_epochs=3)
    assert lengths == [15, 15 - K, 15 - K]
