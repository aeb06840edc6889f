"""Recurrent layers: hidden units go from every gate, layer and direction at once."""

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.speedup import ModelSpeedup
from tests.channels.rules_proof import Call, prove

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    def __init__(self, layer, width, looks=False):
        super().__init__()
        self.first, self.layer, self.last, self.looks = nn.Linear(6, 8), layer, nn.Linear(width, 3), looks

    def forward(self, x):
        if self.looks and x.sum() > 1e9:
            return x
        return self.last(self.layer(self.first(x))[0])


KINDS = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units(kind, options):
    width = 10 * (2 if options.get("bidirectional") else 1)
    model = Around(kind(8, 10, **options), width)
    graph = prove(model, X, {"first": 8, "layer": 10})
    assert graph.trace.data == "none"
    assert [op.name for op in graph.trace.operators].count("aten._cudnn_rnn") == 1


def test_a_module_that_lost_hidden_units_says_so():
    model = Around(nn.LSTM(8, 10, num_layers=2, proj_size=4), 4).double()
    graph = ChannelGraph.watch(model, X.double())
    from nni_plugins.channels import Plan

    plan = Plan(graph, {"first": range(5), "layer": range(6), "layer:1": range(3)})
    ModelSpeedup(model, X.double(), plan.masks(model)).speedup_model()
    assert (model.layer.input_size, model.layer.hidden_size, model.layer.proj_size) == (5, 6, 3)
    assert model.layer.weight_ih_l0.shape == (24, 5)
    assert model.layer.weight_hr_l1.shape == (3, 6)
    assert model(X.double()).shape == (4, 5, 3)


def test_a_projection_and_what_it_projects():
    prove(Around(nn.LSTM(8, 10, 2, proj_size=4, bidirectional=True), 8), X, {"first": 8, "layer": 10, "layer:1": 4})


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_on_real_data(kind):
    prove(Around(kind(8, 10), 10, looks=True), X, {"first": 8, "layer": 10})


def test_a_relu_layer():
    prove(Around(nn.RNN(8, 10, nonlinearity="relu"), 10), X, {"first": 8, "layer": 10})


def test_a_state_that_is_given_stays():
    model = Call(lambda m, x, h: m.out(m.layer(x, h)[0]), layer=nn.GRU(6, 10), out=nn.Linear(10, 3))
    graph = prove(model, (X, torch.randn(1, 5, 10)), {})
    assert graph.group("layer").reason.startswith("joined to something of fixed size")


def test_packed_sequences():
    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(m.first(x), torch.tensor([4, 3, 3, 2, 1]))
        return m.last(m.layer(packed)[1][0][-1])

    model = Call(forward, first=nn.Linear(6, 8), layer=nn.LSTM(8, 10, 2), last=nn.Linear(10, 3))
    prove(model, X, {"first": 8, "layer": 10})


class Steps(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(6, 8), kind(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(self.first(step), state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    prove(Steps(kind), X, {"first": 8, "cell": 10})


def test_cost_counts_every_step():
    graph = ChannelGraph.watch(nn.Sequential(nn.LSTM(6, 10, 2), Call(lambda m, x: x[0])), X)
    steps = X.shape[0] * X.shape[1]
    assert graph.cost().macs == steps * (40 * 6 + 40 * 10 + 40 * 10 + 40 * 10)


def test_fused_cells_tie_their_gates():
    from nni_plugins.channels.call import Call as OneCall
    from nni_plugins.channels.rules import rule_for
    from nni_plugins.channels.trace import Trace

    trace = Trace(nn.Identity())
    x, h, c = (torch.empty(2, size, device="meta") for size in (12, 12, 3))
    for tensor, size in ((x, 12), (h, 12), (c, 3)):
        trace.info(tensor).labels[1] = trace.labels.fresh(size)
    func = torch.ops.aten._thnn_fused_lstm_cell.default
    call = OneCall(trace, func, (x, h, c), {}, (c.clone(), c.clone(), x.clone()), "", "aten._thnn_fused_lstm_cell")
    rule_for(func)[1](call)
    classes = trace.labels.solve().classes
    first = trace.info(c).labels[1]
    for info in (trace.info(x), trace.info(h)):
        assert (classes[info.labels[1].reshape(4, 3)] == classes[first]).all()
