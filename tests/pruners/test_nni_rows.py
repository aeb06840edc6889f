"""What NNI's wrapping does to those who build on it, and that it does not happen with these pruners."""

import copy

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import DynamicSparsePruner, MagnitudePruner, MagnitudeWeightPruner

WEIGHTS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
MAKERS = {
    "weights": lambda net, x: MagnitudeWeightPruner(net, WEIGHTS),
    "groups": lambda net, x: MagnitudePruner(net, WEIGHTS, dummy_input=x),
}


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def steps(model, optimizer, digits, count, watch=None):
    images, labels = digits
    for step in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(images[step * 32 : step * 32 + 32]), labels[step * 32 : step * 32 + 32]
        ).backward()
        optimizer.step()
        if watch:
            watch(step)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_made_before_goes_on_under_the_masks_and_after_them(digits, kind):
    """NNI clones parameters when it wraps and when it unwraps; an optimizer would train orphans."""
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    steps(net, optimizer, digits, 2)
    held = dict(net.named_parameters())
    pruner = MAKERS[kind](net, digits[0][:2])
    model, masks = pruner.compress()
    gone = masks["3"]["weight"] == 0
    before = model[3]._nni_wrapper.weight.detach().clone()
    steps(model, optimizer, digits, 3)
    assert not torch.equal(model[3]._nni_wrapper.weight, before)
    pruner.unwrap_model()
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in held.items()}
    with torch.no_grad():
        net[3].weight[gone] = 0
    before = net[3].weight.detach().clone()
    steps(net, optimizer, digits, 1)
    assert not torch.equal(net[3].weight, before)
    assert set(optimizer.state) == set(net.parameters())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plain_loop_under_masks_is_the_evaluators(digits, kind):
    """The same steps through an evaluator, which makes its optimizer anew, end in the same weights."""
    results = []
    for way in ("loop", "evaluator"):
        net = small()
        optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05, momentum=0.9)
        evaluator = TorchEvaluator(
            lambda model, optimizer, *_: steps(model, optimizer, digits, 4),
            optimizer,
            lambda *_: None,
            dummy_input=digits[0][:2],
        )
        pruner = MAKERS[kind](net, digits[0][:2])
        model, _ = pruner.compress()
        if way == "loop":
            steps(model, optimizer, digits, 4)
        else:
            evaluator._init_optimizer_helpers(model)
            evaluator.bind_model(model)
            evaluator.train(4)
            evaluator.unbind_model()
        pruner.unwrap_model()
        results.append(net.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_distributed_training_that_was_set_up_before_goes_on(tmp_path, digits):
    """DistributedDataParallel hangs its hooks on the parameters that it was given."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        net = small()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        parallel = nn.parallel.DistributedDataParallel(net)
        pruner = MagnitudeWeightPruner(net, WEIGHTS)
        pruner.compress()
        before = pruner.parameters["3.weight"].detach().clone()
        steps(parallel, optimizer, digits, 2)
        assert not torch.equal(pruner.parameters["3.weight"], before)
        pruner.unwrap_model()
        steps(parallel, optimizer, digits, 1)
    finally:
        torch.distributed.destroy_process_group()


def dynamic(net, digits, optimizer=None, watch=None, total=20):
    optimizer = optimizer or nni.trace(torch.optim.SGD)(net.parameters(), lr=0.05, momentum=0.9)

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        steps(model, optimizer, digits, max_steps, (lambda step: watch(step, model)) if watch else None)

    return TorchEvaluator(train, optimizer, lambda *_: None, dummy_input=digits[0][:2])


def test_a_copy_for_an_average_does_not_meddle_with_dense_gradients(digits):
    """The copy is made while hooks are on; its own forward and backward must not count."""
    results = []
    for averaging in (False, True):
        net = small()

        def average(step, model, averaging=averaging):
            if averaging and step % 5 == 3:  # the next step ends in an update
                twin = copy.deepcopy(model)
                twin(digits[0][:8]).square().sum().backward()
                with torch.no_grad():
                    twin(digits[0][:8])

        pruner = DynamicSparsePruner(net, WEIGHTS, dynamic(net, digits, watch=average), 20, update_every=5)
        pruner.compress()
        assert pruner.updates == 2
        results.append(pruner.weight_masks)
        # batch norm statistics of the copy are its own too
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_channels_that_are_gone_do_not_grow_back(digits):
    """With the norm masked too, the dense gradient of a dead channel is 0: only single weights regrow."""
    net = small()
    first = MagnitudePruner(net, WEIGHTS, dummy_input=digits[0][:2])
    _, before = first.compress()
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]
    second = DynamicSparsePruner.from_compressor(
        first, config, evaluator=dynamic(net, digits), total_steps=20, update_every=5, method="set", alpha=1.0
    )
    _, after = second.compress()
    assert second.updates == 2
    for module, targets in before.items():
        for target, mask in targets.items():
            assert (after[module][target] <= mask).all()
    assert second.sparsity == pytest.approx(0.8, abs=0.01)


def test_weights_that_do_not_train_keep_their_masks(digits):
    net = small()
    net[3].weight.requires_grad_(False)
    pruner = DynamicSparsePruner(net, WEIGHTS, dynamic(net, digits), 20, update_every=5)
    pruner.prune()
    before = pruner.weight_masks["3.weight"].clone()
    pruner.compress()
    assert torch.equal(pruner.weight_masks["3.weight"], before)
    assert not net[3].weight.requires_grad


def test_run_again_in_a_fusion_a_finished_pruner_does_nothing(digits):
    net = small()
    first = MagnitudeWeightPruner(net, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, before = first.compress()
    second = DynamicSparsePruner.from_compressor(
        first,
        [{"op_names": ["3"], "sparse_ratio": 0.5}],
        evaluator=dynamic(net, digits),
        total_steps=20,
        update_every=5,
    )
    _, after = second.compress()
    assert torch.equal(before["0"]["weight"], after["0"]["weight"])
    assert second.updates == 2
