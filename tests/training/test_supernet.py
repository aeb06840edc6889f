"""A supernet on digits: slices are what masks say, gradients are the sum over widths, trials share one training."""

from __future__ import annotations

import copy
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.training import CompressionError, build_data, build_model, compress, prepare_dense, recipe_from_dict
from nni_plugins.training.loop import Loop
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.supernet import CHECKPOINT, prepare_supernet, supernet_key
from nni_plugins.training.weights import load_weights
from nni_plugins.training.widths import Sandwich, Widths, imitation
from tests.random_attention_networks import RandomNetwork
from tests.random_networks import RandomCNN

TREE: dict[str, Any] = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"batch_size": 128},
    "train": {"epochs": 4, "warmup_epochs": 1, "threads": 1},
    "prune": {"sparsity": 0.5, "target": "channels"},
    "finetune": {"epochs": 0},
    "supernet": {"epochs": 4, "samples": 2},
}


@pytest.fixture(scope="module")
def recipe() -> Any:
    return recipe_from_dict(TREE)


@pytest.fixture(scope="module")
def dense(recipe: Any, tmp_path_factory: Any) -> Any:
    return prepare_dense(recipe, tmp_path_factory.mktemp("dense"), lambda line: None)


@pytest.fixture(scope="module")
def supernet(recipe: Any, dense: Any) -> Any:
    return prepare_supernet(recipe, dense, dense.path.parent.parent, lambda line: None)


def graph_and_order(model: nn.Module, x: torch.Tensor) -> tuple[ChannelGraph, dict[str, list[int]]]:
    graph = ChannelGraph.watch(model, x)
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in graph.groups if group.prunable and group.exact]
    return graph, {group.name: torch.randperm(group.size, generator=generator).tolist() for group in groups}


class Recurrent(nn.Module):
    """Weights that are read behind the back of ``_parameters``, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(self.first(x).relu())[0][:, -1])


def nets(recipe: Any, kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "recurrent":
        return Recurrent(), torch.randn(2, 4, 6)
    if kind == "resnet":
        return build_model(recipe, (1, 8, 8), 10, 0), torch.randn(2, 1, 8, 8)
    if kind.startswith("random"):
        return RandomCNN(int(kind[-1])), torch.randn(2, 3, 8, 8)
    attention = RandomNetwork(int(kind[-1]))
    example = attention.example()
    return attention.to(example.dtype) if example.is_floating_point() else attention, example


@pytest.mark.parametrize("kind", ["resnet", "recurrent", "random 0", "random 3", "attention 1", "attention 4"])
def test_a_width_is_what_the_masks_of_its_plan_say(kind: str, recipe: Any) -> None:
    model, x = nets(recipe, kind)
    model.eval()
    graph, order = graph_and_order(model, x)
    widths = Widths(model, graph, order)
    before = copy.deepcopy(model.state_dict())
    whole = model(x)
    for share in (0.25, 0.6):
        counts = [max(1, round(size * share)) for size in widths.sizes]
        plan = Plan(graph, {name: order[name][:kept] for name, kept in zip(widths.names, counts, strict=True)})
        masked = copy.deepcopy(model)
        modules = dict(masked.named_modules())
        with torch.no_grad():
            for name, targets in plan.masks(masked).items():
                for target, mask in targets.items():
                    getattr(modules[name], target).mul_(mask)
        with widths.narrowed(counts):
            narrow = model(x)
        torch.testing.assert_close(narrow, masked(x), rtol=0, atol=0)
        assert not torch.allclose(narrow, whole)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_the_sum_over_the_widths_of_a_step() -> None:
    recipe = recipe_from_dict({**TREE, "supernet": {"epochs": 1, "samples": 1, "distill": False}})
    data = build_data(recipe)
    loop = Loop(recipe, data, "test")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    graph, order = graph_and_order(model, data.example)
    widths = Widths(model, graph, order)
    batch = next(iter(data.train))
    sandwich = Sandwich(loop, widths, recipe)
    torch.manual_seed(3)
    counts = sandwich.drawn()
    assert counts[0] == [12]
    assert counts[1] == [3]
    torch.manual_seed(3)
    sandwich(batch, model).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    wanted = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for (kept,) in counts:
        mask = torch.zeros(12).index_fill_(0, torch.tensor(order["1"][:kept]), 1)
        model.zero_grad()
        hidden = (model[1](batch[0].flatten(1)) * mask).relu()
        nn.functional.cross_entropy(nn.functional.linear(hidden, model[3].weight, model[3].bias), batch[1]).backward()
        wanted = [total + parameter.grad for total, parameter in zip(wanted, model.parameters(), strict=True)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_narrow_widths_imitate_the_largest() -> None:
    teacher, output = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    own = torch.tensor(7.0)
    loss = imitation("cross_entropy", nn.functional.cross_entropy, output, teacher, own)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(output, teacher.softmax(1)))
    torch.testing.assert_close(
        imitation("mse", nn.functional.mse_loss, output, teacher, own), ((output - teacher) ** 2).mean()
    )
    assert imitation("mine:loss", None, output, teacher, own) is own
    assert imitation("cross_entropy", None, {"logits": output}, teacher, own) is own


def test_it_is_trained_once_and_its_slices_beat_those_of_the_dense_model(
    recipe: Any, dense: Any, supernet: Any, tmp_path: Path
) -> None:
    lines: list[str] = []
    again = prepare_supernet(recipe, dense, dense.path.parent.parent, lines.append)
    assert again == supernet
    assert lines == []
    assert supernet.accuracy > 0.85
    values = {"prune.sparsity": 0.75, "prune.scope": "local"}
    metrics = compress(recipe.with_values(values), tmp_path / "slice", dense)
    assert metrics["relative_error"] < 1e-5
    assert metrics["accuracy"] == pytest.approx(supernet.smallest, abs=0.02)
    alone = {**values, "supernet.epochs": 0, "speedup.recalibrate_batches": 20}
    without = compress(recipe.with_values(alone), tmp_path / "alone", dense)
    assert without["macs"] == metrics["macs"]
    assert metrics["accuracy"] > without["accuracy"] + 0.1
    plan = json.loads((tmp_path / "slice" / "plan.json").read_text(encoding="utf-8"))["groups"]
    order = json.loads(supernet.order.read_text(encoding="utf-8"))
    for name, entry in plan.items():
        assert entry["kept"] == sorted(order[name][: len(entry["kept"])])


def test_a_training_that_was_cut_off_goes_on_to_the_same_weights(
    recipe: Any, dense: Any, supernet: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    home = tmp_path / f"{recipe.dense_key()}-supernet-{supernet_key(recipe)}"
    steps = []
    theirs = Sandwich.__call__

    def cut(self: Any, batch: Any, model: nn.Module) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 25:  # in the third epoch
            raise CompressionError("cut off")
        return theirs(self, batch, model)

    monkeypatch.setattr(Sandwich, "__call__", cut)
    with pytest.raises(CompressionError, match="cut off"):
        prepare_supernet(recipe, dense, tmp_path, lambda line: None)
    assert (home / CHECKPOINT).is_file()
    found = prepare_supernet(recipe, dense, tmp_path, lambda line: None)
    assert not (home / CHECKPOINT).exists()
    data = build_data(recipe)
    models = [build_model(recipe, data.shape, data.classes, 1) for _ in range(2)]
    for model, path in zip(models, (found.path, supernet.path), strict=True):
        load_weights(model, path)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def _prepare(folder: Path, lines: Any) -> None:
    recipe = recipe_from_dict({**TREE, "train": {"epochs": 1, "threads": 1}, "supernet": {"epochs": 1, "samples": 0}})
    baseline = prepare_dense(recipe, folder, lambda line: None)
    prepare_supernet(recipe, baseline, folder, lines.put)


def test_two_trials_at_once_train_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    lines = context.Queue()
    trials = [context.Process(target=_prepare, args=(tmp_path, lines)) for _ in range(2)]
    for trial in trials:
        trial.start()
    for trial in trials:
        trial.join(300)
        assert trial.exitcode == 0
    told = [lines.get(timeout=5) for _ in range(lines.qsize())]
    assert sum("training" in line and "epochs" in line for line in told) == 1


def test_a_pruner_that_ranks_no_channels_is_refused(recipe: Any, dense: Any, tmp_path: Path) -> None:
    other = recipe.with_values({"supernet.pruner": "weight_magnitude"})
    with pytest.raises(
        (CompressionError, ValueError), match=r"supernet\.pruner weight_magnitude gives no scores|prune"
    ):
        prepare_supernet(other, dense, tmp_path, lambda line: None)


def test_statistics_of_a_slice_are_its_own(recipe: Any, dense: Any, supernet: Any) -> None:
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0)
    load_weights(model, supernet.path)
    loop = Loop(recipe, data, "test")
    graph = ChannelGraph.watch(model, data.example)
    widths = Widths(model, graph, json.loads(supernet.order.read_text(encoding="utf-8")))
    counts = [max(1, size // 4) for size in widths.sizes]
    with widths.narrowed(counts):
        before = loop.evaluate(model)
        recalibrate(model, loop, 20)
        assert loop.evaluate(model) > before + 0.05
