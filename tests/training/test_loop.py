"""The training loop: it learns, it resumes bit by bit, it stops when it diverges, it leaves the test split alone."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from nni_plugins.training import CompressionError, Loop, build_data, build_model, recipe_from_dict
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.loop import pick_device
from nni_plugins.training.schedule import factor


def start(recipe):
    data = build_data(recipe)
    loop = Loop(recipe, data)
    model = build_model(recipe, data.shape, data.classes, recipe.seed)
    seed_everything(recipe.seed)
    return loop, model, loop.optimizer(model)


def test_it_learns_and_reports_the_last_epoch(recipe):
    loop, model, optimizer = start(recipe)
    seen = []
    last = loop.train(model, optimizer, on_epoch=lambda epoch, value: seen.append((epoch, value)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert last == seen[-1][1] == loop.evaluate(model) > 0.9
    images, labels = next(iter(build_data(recipe).validation))
    assert loop.evaluate(model, [(images, labels)]) == pytest.approx(
        (model.eval()(images).argmax(1) == labels).float().mean().item()
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train.optimizer": "adamw", "train.learning_rate": 0.01, "train.schedule": "step"},
        {"model.name": "mobilenetv2", "model.arguments": {"width": 0.1, "dropout": 0.3}, "data.limit": 200,
         "data.augment": "crop"},
    ],
)  # fmt: skip
def test_a_resumed_training_equals_one_never_stopped(recipe, tmp_path, settings):
    recipe = recipe.with_values(settings)
    loop, whole, optimizer = start(recipe)
    scores = []
    loop.train(whole, optimizer, on_epoch=lambda epoch, value: scores.append(value))

    def stop_after_two(epoch, value):
        if epoch == 3:
            raise Interrupted

    loop, model, optimizer = start(recipe)
    with pytest.raises(Interrupted):
        loop.train(model, optimizer, on_epoch=stop_after_two, checkpoint=tmp_path / "state.pt")
    torch.rand(100)  # another process has another random state
    loop, model, optimizer = start(recipe.with_values({}))
    seed_everything(99)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    resumed = []
    loop.train(model, optimizer, on_epoch=lambda e, value: resumed.append(value), checkpoint=tmp_path / "state.pt")
    assert resumed == scores[2:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert loop.train(model, optimizer, on_epoch=lambda *_: None, checkpoint=tmp_path / "state.pt") == scores[-1]


OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def loaders():
    torch.manual_seed(5)
    part = lambda: TensorDataset(torch.rand(64, 4), torch.randint(0, 3, (64,)))
    own = torch.Generator().manual_seed(3)
    return (DataLoader(part(), batch_size=16, shuffle=True, generator=own), DataLoader(part(), batch_size=16))

def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
"""


def test_own_shuffled_loader_resumes_too(tmp_path):
    (tmp_path / "own_resume.py").write_text(OWN)
    recipe = recipe_from_dict(
        {"model": {"name": "own_resume:net"}, "data": {"name": "own_resume:loaders"}, "train": {"epochs": 4}},
        folder=tmp_path,
    )
    loop, whole, optimizer = start(recipe)
    loop.train(whole, optimizer)
    for _ in range(2):  # the first is stopped in its third epoch
        loop, model, optimizer = start(recipe)
        steps = iter(range(10))

        def count(steps=steps):
            if next(steps, None) is None:
                raise Interrupted

        try:
            loop.train(model, optimizer, checkpoint=tmp_path / "state.pt", after_step=count)
        except Interrupted:
            continue
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_checkpoint_that_cannot_be_used(recipe, tmp_path, content):
    path = tmp_path / "state.pt"
    loop, model, optimizer = start(recipe)
    if content is None:  # of another model
        loop.train(model, optimizer, max_epochs=1, checkpoint=path)
        loop, model, optimizer = start(recipe.with_values({"model.arguments.hidden": [7]}))
    else:
        path.write_bytes(content)
    with pytest.raises(
        CompressionError, match=r"state\.pt cannot be resumed from .*; delete it to start afresh"
    ) as caught:
        loop.train(model, optimizer, checkpoint=path)
    assert "\n" not in str(caught.value)


def test_divergence_ends_it_early_and_says_why(recipe):
    loop, model, optimizer = start(
        recipe.with_values({"train.learning_rate": 1e9, "model.arguments.batch_norm": False})
    )
    steps = []
    with pytest.raises(
        CompressionError, match=r"training diverged: the loss is \w+ in epoch 1, step \d+ \(learning rate 1e\+09"
    ):
        loop.train(model, optimizer, after_step=lambda: steps.append(1))
    assert len(steps) < 18


def test_the_test_split_is_not_read_while_training(recipe):
    loop, model, optimizer = start(recipe)
    read = []
    loop.data.read_test = lambda: read.append(1)
    loop.train(model, optimizer, on_epoch=lambda *_: None)
    assert not read


def test_steps_and_epochs_as_nni_asks_for_them(recipe):
    loop, model, optimizer = start(recipe)
    for ask, steps in [({"max_steps": 5}, 5), ({"max_steps": 20}, 20), ({"max_epochs": 2}, 36), ({}, 54),
                       ({"max_epochs": 1, "max_steps": 30}, 18), ({"max_epochs": 0}, 0)]:  # fmt: skip
        count = []
        loop.train(model, optimizer, after_step=lambda count=count: count.append(1), **ask)
        assert len(count) == steps
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_short_calls_go_on_through_the_data(recipe):
    loop, model, optimizer = start(recipe)
    seen = []

    def step(batch, model):
        seen.append(batch[1].tolist())
        return loop.training_step(batch, model)

    for _ in range(3):
        loop.train(model, optimizer, step, max_steps=1)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_schedules():
    settings = recipe_from_dict({"train": {"warmup_epochs": 1}}).train
    rates = [factor(settings, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    step = recipe_from_dict({"train": {"schedule": "step", "warmup_epochs": 0}}).train
    assert [round(factor(step, at, 100, 10), 6) for at in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    short = recipe_from_dict({"train": {"warmup_epochs": 5}}).train
    assert max(factor(short, at, 10, 10) for at in range(10)) == 1


def test_same_seed_same_model(recipe):
    results = []
    for seed in (0, 0, 1):
        loop, model, optimizer = start(recipe.with_values({"seed": seed}))
        loop.train(model, optimizer, max_epochs=1)
        results.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_norms_and_biases_are_not_decayed(recipe):
    _, model, optimizer = start(recipe)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        name: 5e-4 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()
    }


def test_gradient_is_clipped(recipe):
    plain_steps = {"train.momentum": 0.0, "train.weight_decay": 0.0}
    loop, model, optimizer = start(recipe.with_values({"train.clip_norm": 1e-3, **plain_steps}))
    before = [p.detach().clone() for p in model.parameters()]
    loop.train(model, optimizer, max_steps=1)
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(model.parameters(), before, strict=True)))
    assert moved <= 0.1 * 1e-3 * 1.01


def test_evaluation_leaves_modes_alone(recipe):
    loop, model, _ = start(recipe)
    model.train()
    model.norm1.eval()
    loop.evaluate(model)
    assert model.training
    assert not model.norm1.training


REGRESSION = """
import torch

def loaders():
    x = torch.linspace(-1, 1, 256)[:, None]
    y = (x.square() * 2).squeeze(1)
    batches = [(x[i::8], y[i::8]) for i in range(8)]
    return batches[:6], batches[6:7], batches[7:]

def net(): return torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
def loss(output, target): return (output.squeeze(1) - target).abs().mean()
def worst(output, target): return (output.squeeze(1) - target).abs().max().item()
worst.higher_is_better = False
def nothing(output, target): return output.nope
def optimizer(groups, lr): return torch.optim.RMSprop(groups, lr=lr)
def no_optimizer(groups, lr): return lr
"""


@pytest.mark.parametrize("settings", [
    {"loss": "mse", "metric": "mse", "optimizer": "adam"},
    {"loss": "l1", "metric": "r2", "optimizer": "adam"},
    {"loss": "own_regress:loss", "metric": "own_regress:worst", "optimizer": "own_regress:optimizer"},
])  # fmt: skip
def test_regression_with_own_parts(tmp_path, settings):
    (tmp_path / "own_regress.py").write_text(REGRESSION)
    recipe = recipe_from_dict(
        {"model": {"name": "own_regress:net"}, "data": {"name": "own_regress:loaders"},
         "train": {"epochs": 60, "learning_rate": 0.01, **settings}}, folder=tmp_path)  # fmt: skip
    loop, model, optimizer = start(recipe)
    before = loop.evaluate(model)
    after = loop.train(model, optimizer, on_epoch=lambda *_: None)
    assert loop.metric.higher_is_better == (settings["metric"] == "r2")
    assert loop.metric.better(after) > loop.metric.better(before)
    assert {"mse": after < 0.01, "r2": after > 0.97, "own_regress:worst": after < before / 2}[settings["metric"]]


def test_own_parts_that_do_not_work(tmp_path):
    from nni_plugins.training import RecipeError

    (tmp_path / "own_regress.py").write_text(REGRESSION)
    recipe = recipe_from_dict({"train": {"metric": "own_regress:nothing"}}, folder=tmp_path)
    loop, model, _ = start(recipe)
    with pytest.raises(CompressionError, match=r"train\.metric nothing cannot be computed"):
        loop.evaluate(model)
    with pytest.raises(RecipeError, match=r"train\.optimizer is own_regress:no_optimizer: it returned float"):
        start(recipe.with_values({"train.optimizer": "own_regress:no_optimizer"}))
    with pytest.raises(CompressionError, match=r"train\.device is cuda:9|train\.device is gpu"):
        start(recipe.with_values({"train.device": "gpu"}))


def test_mse_does_not_broadcast():
    recipe = recipe_from_dict({"train": {"loss": "mse", "metric": "mse"}})
    loop = Loop(recipe, build_data(recipe))
    output, target = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
    assert loop.loss(output, target) == 0
    assert loop.metric.function(output, target) == 0


def test_channels_last(small_cnn):
    loop, plain, optimizer = start(small_cnn)
    loop.train(plain, optimizer, max_steps=3)
    loop, model, optimizer = start(small_cnn.with_values({"train.channels_last": True}))
    loop.place(model)
    loop.train(model, optimizer, max_steps=3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-5)
    assert model.stage2.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_nan_metric_is_divergence(recipe):
    loop, model, optimizer = start(recipe)
    model.head.register_forward_hook(lambda module, args, out: out if module.training else out * math.nan)
    loop.metric = type(loop.metric)("mean", lambda out, target: out.mean().item(), True)
    with pytest.raises(CompressionError, match="mean is nan after epoch 1"):
        loop.train(model, optimizer, on_epoch=lambda *_: None)


def test_a_model_without_parameters(recipe):
    from nni_plugins.training import RecipeError

    with pytest.raises(RecipeError, match="no parameter to train"):
        Loop(recipe, build_data(recipe)).optimizer(nn.Flatten())


BROKEN = """
import torch

def several(output, target): return (output - 1.0) ** 2
def number(output, target): return 3.0
def detached(output, target): return torch.tensor(1.0)
def fails(output, target): raise RuntimeError("my loss is broken\\nsecond line")
def model(): raise KeyError("weights")
"""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.loss": "own_broken:several"}, "train.loss own_broken:several gives float32 [64, 10]; it must be one"),
        ({"train.loss": "own_broken:number"}, "train.loss own_broken:number gives float; it must be one number"),
        ({"train.loss": "own_broken:detached"}, "gives float32 []; it must be one number that depends on the output"),
        ({"train.loss": "own_broken:fails"}, "RuntimeError: my loss is broken (own_broken.py, line "),
        ({"train.loss": "mse"}, "train.loss mse cannot be computed of output float32 [64, 10] and target int64 [64]"),
        ({"model.arguments": {"shape": [3, 9, 9]}}, "training: the model fails on inputs float32 [64, 1, 8, 8]: "),
        ({"model.name": "own_broken:model", "model.arguments": {}}, "own_broken:model, which fails: KeyError: "),
    ],
)
def test_own_parts_that_fail_are_named_in_one_line(tmp_path, recipe, values, message):
    from nni_plugins.training import RecipeError

    (tmp_path / "own_broken.py").write_text(BROKEN)

    def one_step():
        loop, model, optimizer = start(recipe.with_values({"folder": str(tmp_path), **values}))
        loop.train(model, optimizer, max_steps=1)

    with pytest.raises((CompressionError, RecipeError)) as caught:
        one_step()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["meta", "cuda:99", "cudaa", "", "vulkan", "xla", "privateuseone", "mkldnn", "opengl"])
def test_a_device_that_cannot_be_is_one_line(name):
    if name == "cuda:99" and torch.cuda.device_count() > 99:
        pytest.skip("it can be")
    with pytest.raises(CompressionError, match=r"^train\.device is ") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


CRASH = """
import sys, torch
from torch import nn
from nni_plugins.training import Loop, build_data, recipe_from_dict
from nni_plugins.training.evaluator import RecipeEvaluator

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 16, 1, stride=2, bias=False)
        self.block = nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.down(x) + self.block(x)).relu().mean((2, 3)))

recipe = recipe_from_dict({"data": {"batch_size": 32}, "train": {"epochs": 2, "channels_last": True, "threads": 1}})
loop = Loop(recipe, build_data(recipe))
model = loop.place(Net())
if sys.argv[1] == "pruner":
    from nni_plugins.pruners import TaylorPruner
    pruner = TaylorPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.25}], RecipeEvaluator(loop), 60)
    pruner.compress()
else:
    loop.train(model, loop.optimizer(model))
assert model.block.weight.is_contiguous(memory_format=torch.channels_last)
assert not model.down._forward_pre_hooks
print("trained")
"""


@pytest.mark.parametrize("how", ["plain", "pruner"])
def test_strided_1x1_convolutions_of_few_channels_do_not_end_the_process(how):
    """oneDNN's gradient of such a convolution writes past its buffers where the picture is channels last."""
    done = subprocess.run([sys.executable, "-c", CRASH, how], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("trained\n")


def test_convolutions_that_got_narrow_are_guarded_too():
    from nni_plugins.training.channels_last import guarded, is_unsafe

    wide, narrow = nn.Conv2d(32, 8, 1, stride=2), nn.Conv2d(32, 8, 1, stride=2)
    narrow.weight.data = narrow.weight.data[:, :5].clone()  # as a compaction leaves it
    narrow.to(memory_format=torch.channels_last)
    assert not is_unsafe(wide)
    assert is_unsafe(narrow)
    assert not any(
        is_unsafe(conv) for conv in (nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 1), nn.Conv2d(1, 8, 1, 2))
    )
    x = torch.rand(2, 5, 1, 1).to(memory_format=torch.channels_last)  # the strides of one pixel say nothing
    seen = []
    narrow.register_forward_hook(lambda module, inputs, _: seen.append((inputs[0].stride(), module.weight.stride())))
    with guarded(nn.Sequential(wide, narrow)):
        narrow(x)
    assert seen == [((5, 1, 1, 1), (5, 1, 1, 1))]
