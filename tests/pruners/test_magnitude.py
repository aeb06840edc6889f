import pytest
import torch

from nni_plugins.pruners import MagnitudePruner, PruningError

from .nets import X, make


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_are_the_norm_over_all_that_goes_with_a_unit(norm):
    net = make("plain")
    parts = [net.conv1.weight.detach().flatten(1), net.bn1.weight.detach()[:, None]]
    parts.append(net.conv2.weight.detach().transpose(0, 1).flatten(1))
    expected = torch.cat(parts, 1).double().norm(p=int(norm[1]), dim=1)
    pruner = MagnitudePruner(net, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], dummy_input=X, norm=norm)
    pruner.compress()
    torch.testing.assert_close(pruner.scores["conv1"], expected, rtol=1e-6, atol=0)
    assert pruner.plan.kept["conv1"].tolist() == sorted(expected.argsort()[8:].tolist())


def test_an_unknown_norm_is_refused():
    with pytest.raises(PruningError, match="norm is 'l3'"):
        MagnitudePruner(make("plain"), [], dummy_input=X, norm="l3")
