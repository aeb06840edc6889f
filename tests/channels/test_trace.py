"""What a run tells of tensors that come in unusual ways: in dataclasses and objects, written through views."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph

X = torch.randn(2, 3, 6, 6)


@dataclass(frozen=True)
class Batch:
    image: torch.Tensor
    sizes: tuple[int, int] = (6, 6)


class Plain:
    def __init__(self, image):
        self.image = image


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.shift = torch.ones(1)  # neither a parameter nor a buffer

    def forward(self, batch):
        return self.b(F.relu(self.a(batch.image)) * torch.tensor(2.0) + self.shift)


@pytest.mark.parametrize("kind", [Batch, Plain])
def test_inputs_in_objects_depend_on_the_input_and_constants_do_not(kind):
    given = kind(X)
    graph = ChannelGraph.watch(Takes(), (given,))
    assert given.image is X
    dynamic = {op.module or op.name: [info.dynamic for info in op.inputs] for op in graph.trace.operators}
    assert dynamic["a"] == [True, False, False]
    assert dynamic["aten.mul"] == [True, False]
    assert dynamic["aten.add"] == [True, False]


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.write(self.a(x)))


def through_a_view(y):
    y[:, :, 1:].add_(1.0)
    return y


def through_the_whole(y):
    view = y.flatten(2)
    y.mul_(2)
    return view.view_as(y)


def in_place(y):
    y += 1
    return F.relu_(y)


def one_half(y):
    a, b = y.chunk(2, 1)
    return torch.cat([F.silu(a, inplace=True), b], 1)


def some_of_each(y):
    y.unflatten(1, (2, 4))[:, :, ::2].mul_(2)
    return y


@pytest.mark.parametrize(
    ("write", "prunable"),
    [(through_a_view, True), (through_the_whole, True), (in_place, True), (one_half, True), (some_of_each, False)],
)
def test_what_is_written_through_another_view_is_frozen_where_its_channels_are_not_seen(write, prunable):
    group = ChannelGraph.watch(Writes(write), X).group("a")
    assert group.prunable == prunable
    assert prunable or group.reason == "a part of it is written in place (the model)"


def test_outputs_for_the_backward_pass_have_labels():
    group = ChannelGraph.watch(Writes(F.logsigmoid), X).group("a")
    assert group.prunable
    op = next(op for op in ChannelGraph.watch(Writes(F.logsigmoid), X).trace.operators if "log_sigmoid" in op.name)
    for info in op.outputs:
        assert info.labels[1] is not None or info.shape != (2, 8, 6, 6)
