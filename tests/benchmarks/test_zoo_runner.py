"""The zoo's own machinery: it must see what is wrong, go on after what hangs or dies, and resume."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.zoo import runner
from benchmarks.zoo.weights import calibrate, draw, redraw, two_of
from benchmarks.zoo.work import difference, half, masked_outputs, train_step, work
from nni_plugins.channels import ChannelGraph, Plan


class Deep(nn.Module):
    """Thirty layers that start as torch starts them: without calibration nothing of the input is left at the end."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(30)]
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks)
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def deep():
    torch.manual_seed(0)
    return Deep(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Sleepy(Deep):
    def forward(self, x):
        time.sleep(60)
        return x


class Deadly(Deep):
    def forward(self, x):
        os._exit(7)


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 3)

    def forward(self, x):
        return self.only(x)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 3)

    def forward(self, x):
        raise ValueError("this model does not run")


def build(name):
    if name == "deep":
        return deep()
    if name in ("nothing", "broken"):
        return (Nothing() if name == "nothing" else Broken()), torch.randn(2, 4)
    return {"sleepy": Sleepy, "deadly": Deadly}[name](), deep()[1]


def test_a_zoo_goes_on_after_what_dies_and_resumes(tmp_path, capsys):
    names = ["broken", "deadly", "deep", "nothing"]
    results = tmp_path / "results.jsonl"
    arguments = ["--results", str(results), "--timeout", "100", "--threads", "1", "--modes", "exact"]
    runner.main("test", lambda: names, build, [*arguments, "--markdown", str(tmp_path / "table.md")])
    rows = {row["model"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "broken": "error",
        "deadly": "died",
        "deep": "done",
        "nothing": "nothing",
    }
    assert rows["broken"]["error"] == "ValueError: this model does not run"
    assert rows["deep"]["error_of_output"] < 1e-5
    assert rows["deep"]["params_after"] < rows["deep"]["params_before"] / 2
    assert rows["deep"]["trained"] == "train, batch 2"
    assert rows["deep"]["rss_mb"] > 10
    table = (tmp_path / "table.md").read_text()
    assert "every exact group: **1 of 4** done" in table
    assert "the model's output" in table, "what has nothing to prune is named with the reason"
    runner.main("test", lambda: names, build, arguments)
    assert len(results.read_text().splitlines()) == 4, "what has a result is not run again"
    runner.main("test", lambda: names, build, [*arguments, "no*", "deep", "--failed"])
    assert len(results.read_text().splitlines()) == 5, "only what was not done is"
    with pytest.raises(SystemExit, match="no model is called 'depe'"):
        runner.main("test", lambda: names, build, [*arguments, "depe"])
    capsys.readouterr()


def test_what_hangs_is_ended(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    runner.main("test", lambda: ["sleepy"], build, ["--results", str(results), "--timeout", "3", "--modes", "exact"])
    row = json.loads(results.read_text())
    assert (row["status"], row["error"]) == ("timeout", "after 3 s")
    capsys.readouterr()


def test_calibration_keeps_the_signal_of_the_masked_model_alive():
    model, x = deep()
    draw(model)
    graph = ChannelGraph.watch(model, x)
    masks = Plan(graph, half(graph, [g.name for g in graph.groups if g.prunable])).masks(model)
    faint = masked_outputs(model, masks, [redraw(x, 1), redraw(x, 2)])
    assert difference(*faint) < 1e-3, "as torch starts it, two inputs give nearly the same"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibrate(model, x, masks)
    outputs = masked_outputs(model, masks, [redraw(x, 1), redraw(x, 2)])
    assert difference(*outputs) > 0.02
    for name, parameter in model.named_parameters():  # what was masked for the time being has its weights back
        assert torch.equal(parameter == 0, before[name] == 0)


def test_a_wrong_model_is_called_wrong(monkeypatch):
    from nni_plugins.speedup import ModelSpeedup

    class Off(ModelSpeedup):
        def speedup_model(self):
            model = super().speedup_model()
            with torch.no_grad():
                model.body[1][0].weight[0].neg_()
            return model

    monkeypatch.setattr("nni_plugins.speedup.ModelSpeedup", Off)
    row = work(deep, "exact", lambda data: None)
    assert row["status"] == "wrong"
    assert row["error_of_output"] > 1e-4


def test_differences_are_measured_output_by_output():
    small, large = torch.ones(3), torch.full((2,), 1e6)
    assert difference([small * 1.5, large], [small, large]) == pytest.approx(0.5)
    assert difference([small], [torch.ones(4)]) == float("inf")
    assert difference([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")


def test_half_takes_at_least_one_unit_and_leaves_one():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = ChannelGraph.watch(model, torch.randn(1, 4))
    names = [g.name for g in graph.groups if g.prunable]
    assert {name: len(kept) for name, kept in half(graph, names).items()} == {"0": 1, "2": 2}
    assert {name: len(kept) for name, kept in half(graph, names, 0.99).items()} == {"0": 1, "2": 1}


def test_inputs_are_drawn_anew_with_tokens_kept_valid():
    inputs = {
        "ids": torch.arange(10).reshape(1, 10),
        "mask": torch.ones(1, 10, dtype=torch.bool),
        "x": torch.zeros(1, 3),
    }
    drawn = redraw(inputs, 1)
    assert sorted(drawn["ids"].flatten().tolist()) == list(range(10))
    assert not torch.equal(drawn["ids"], inputs["ids"])
    assert torch.equal(drawn["mask"], inputs["mask"])
    assert drawn["x"].any()
    assert {key: value.shape[0] for key, value in two_of(inputs).items()} == {"ids": 2, "mask": 2, "x": 2}


def test_a_compact_model_that_cannot_train_is_not_excused_by_one_image():
    """The dense model trains on two images: that the compact one does so in eval mode only is no training."""

    class Picky(Nothing):
        def forward(self, x):
            if self.training:
                raise RuntimeError("sizes do not fit")
            return self.only(x)

    with pytest.raises(RuntimeError, match="sizes do not fit"):
        train_step(Picky(), torch.randn(1, 4), Nothing)
    assert train_step(Picky(), torch.randn(1, 4), Picky) == "eval, batch 1"


def test_units_that_stay_are_in_order():
    graph = ChannelGraph.watch(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(1, 4))
    kept = half(graph, ["0"])["0"]
    assert len(kept) == 8
    assert (np.diff(kept) > 0).all()


class Finds(Deep):
    """Returns the rows that it finds, and finds none."""

    def forward(self, x):
        return super().forward(x)[:0]


def test_an_output_without_a_number_shows_nothing():
    row = work(lambda: (Finds(), deep()[1]), "exact", lambda data: None, zoo="test", model="finds")
    assert row["status"] == "no output"
