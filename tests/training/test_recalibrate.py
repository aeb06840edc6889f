"""Batch-norm recalibration: statistics become the plain mean over the batches."""

import torch
from torch import nn

from nni_plugins.training import Loop, build_data, build_model
from nni_plugins.training.recalibrate import recalibrate


def test_statistics_are_the_mean_over_batches(small_cnn):
    data = build_data(small_cnn)
    loop = Loop(small_cnn, data)
    model = build_model(small_cnn, data.shape, data.classes, 0)
    seen = []
    model.stage1.norm1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    weights = [parameter.clone() for parameter in model.parameters()]
    model.train()
    model.stage2.norm1.eval()
    model.stage1.norm1.momentum = 0.3
    assert recalibrate(model, loop, 3) == 3
    inputs = seen[:3]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(model.stage1.norm1.running_mean, mean)
    torch.testing.assert_close(model.stage1.norm1.running_var, var)
    assert (model.training, model.stage2.norm1.training, model.stage1.norm1.momentum) == (True, False, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    before = model.state_dict()["stage1.norm1.running_mean"].clone()
    recalibrate(model, loop, 3)
    assert torch.equal(before, model.stage1.norm1.running_mean)  # always the same batches
    assert recalibrate(model, loop, 10_000) == len(data.train)


def test_nothing_to_do(small_cnn):
    loop = Loop(small_cnn, build_data(small_cnn))
    assert recalibrate(nn.Conv2d(1, 1, 3), loop, 3) == 0
    assert recalibrate(nn.BatchNorm2d(1, track_running_stats=False), loop, 3) == 0
    norm = nn.BatchNorm2d(1)
    assert recalibrate(norm, loop, 0) == 0
    assert norm.num_batches_tracked == 0
