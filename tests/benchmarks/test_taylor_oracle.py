"""A short form of the benchmark: Taylor scores agree with what the loss says when each unit is left out."""

import pytest
import torch

from benchmarks import taylor_oracle


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    data = taylor_oracle.digits()
    model = taylor_oracle.trained(data, 0, epochs=8)
    given = taylor_oracle.batches(data, 12)
    return model, given, taylor_oracle.oracle(model, given)


@pytest.mark.parametrize(("name", "least"), [("weight", 0.9), ("gate, second order", 0.9), ("gate", 0.75)])
def test_scores_agree_with_the_oracle(net, name, least):
    model, given, truth = net
    rank, _ = taylor_oracle.correlations(truth, taylor_oracle.scores(model, given, **taylor_oracle.VARIANTS[name]))
    assert rank >= least


def test_the_oracle_leaves_one_unit_out(net):
    model, given, truth = net
    with torch.no_grad():
        whole = [torch.nn.functional.cross_entropy(model(x), y) for x, y in given]
        handle = model[1].register_forward_hook(lambda _m, _i, out: out * (torch.arange(12) != 3)[:, None, None])
        without = [torch.nn.functional.cross_entropy(model(x), y) for x, y in given]
        handle.remove()
    expected = torch.stack([(a - b) ** 2 for a, b in zip(whole, without, strict=True)]).double().mean()
    torch.testing.assert_close(truth["0"][3], expected, rtol=1e-4, atol=1e-12)
