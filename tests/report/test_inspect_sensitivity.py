"""Sensitivity: each group alone, the least units first, and every bit put back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.report.inspect import InspectError
from nni_plugins.report.inspect_sensitivity import sensitivity_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )


def evaluator(model: nn.Module, seen: list[dict[str, torch.Tensor]] | None = None) -> Any:
    def evaluate() -> tuple[str, bool, float]:
        if seen is not None:
            seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        with torch.no_grad():
            return "norm", True, model(X).norm().item()

    return evaluate


def test_the_least_units_are_masked_one_group_at_a_time() -> None:
    model = net()
    graph = ChannelGraph.watch(model, X)
    seen: list[dict[str, torch.Tensor]] = []
    result = sensitivity_of(model, graph, evaluator(model, seen), (0.25, 0.75))
    before = dict(model.named_parameters())
    assert list(result["groups"]) == ["0", "3"]
    assert len(seen) == 1 + 2 * 2
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())
    norms = before["0.weight"].abs().sum((1, 2, 3)) + before["1.weight"].abs() + before["3.weight"].abs().sum((0, 2, 3))
    for state, lost in ((seen[1], 2), (seen[2], 6)):
        gone = state["0.weight"].abs().sum((1, 2, 3)) == 0
        assert gone.sum() == lost
        assert set(gone.nonzero().flatten().tolist()) == set(norms.argsort()[:lost].tolist())
        assert (state["1.weight"][gone] == 0).all()
        assert (state["3.weight"][:, gone] == 0).all()
        assert torch.equal(state["3.bias"], before["3.bias"])
        assert torch.equal(state["5.weight"], before["5.weight"])
    assert all(torch.equal(seen[3][name], value) for name, value in before.items() if name[0] in "01")
    masked = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, value in masked.named_parameters():
            value.copy_(seen[1][name])
        assert result["groups"]["0"]["0.25"] == pytest.approx(masked(X).norm().item(), rel=1e-6)
        assert result["dense"] == pytest.approx(model.eval()(X).norm().item(), rel=1e-6)


def test_weights_buffers_and_modes_are_put_back_bit_for_bit() -> None:
    model = net().train()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
        model[0].weight[1, 0, 0, 0] = 1e-42
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    def careless() -> tuple[str, bool, float]:
        model.train()
        value = model(X + torch.randn_like(X)).norm()
        value.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        return "norm", True, value.item()

    sensitivity_of(model, ChannelGraph.watch(model, X), careless, (0.5,))
    for name, value in model.state_dict().items():
        assert value.numpy().tobytes() == before[name].numpy().tobytes(), name
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_they_are_put_back_when_the_metric_fails() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def fails() -> tuple[str, bool, float]:
        calls.append(1)
        if len(calls) == 3:
            raise InspectError("no more")
        return "norm", True, 1.0

    with pytest.raises(InspectError, match="no more"):
        sensitivity_of(model, ChannelGraph.watch(model, X), fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_at_least_one_unit_stays_and_what_is_no_number_is_none() -> None:
    model = net()
    values = iter([1.0] + [math.nan, 0.5] * 2)
    result = sensitivity_of(model, ChannelGraph.watch(model, X), lambda: ("m", False, next(values)), (0.99, 0.5))
    assert result["groups"] == {"0": {"0.5": None, "0.99": 0.5}, "3": {"0.5": None, "0.99": 0.5}}
    assert result["higher_is_better"] is False
    with pytest.raises(InspectError, match="as it is is nan"):
        sensitivity_of(model, ChannelGraph.watch(model, X), lambda: ("m", True, math.nan))
