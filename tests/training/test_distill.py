"""A teacher beside fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.training.data import build_data
from nni_plugins.training.dense import dense_model, prepare_dense
from nni_plugins.training.distill import Distillation, build_teacher, dkd, kd, kept_channels
from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.loop import Loop
from nni_plugins.training.pipeline import compress
from nni_plugins.training.prune import prune
from nni_plugins.training.recipe import recipe_from_dict
from nni_plugins.training.sections import DistillSettings

TREE = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"limit": 600},
    "train": {"epochs": 6, "threads": 1},
    "prune": {"sparsity": 0.6},
    "finetune": {"epochs": 2},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return prepare_dense(recipe_from_dict(TREE), tmp_path_factory.mktemp("dense"), lambda line: None)


def test_a_student_that_agrees_loses_nothing():
    logits, classes = torch.randn(8, 5), torch.randint(5, (8,))
    for loss in (kd, dkd):
        assert float(loss(logits, logits, classes, DistillSettings())) == pytest.approx(0, abs=1e-5)
        assert float(loss(logits, logits + torch.randn(8, 5), classes, DistillSettings())) > 0.01
        assert float(loss(logits, logits + 3, classes, DistillSettings())) == pytest.approx(0, abs=1e-5)


def test_dkd_with_equal_weights_is_kd_where_the_teacher_is_sure_of_nothing():
    """KD = TCKD + (1 − p) · NCKD (Zhao et al., equation 6), per input."""
    torch.manual_seed(0)
    student, teacher, classes = torch.randn(1, 6), torch.randn(1, 6), torch.tensor([2])
    heat = 4.0
    share = float(F.softmax(teacher / heat, dim=1)[0, 2])
    both = dkd(student, teacher, classes, DistillSettings(alpha=1.0, beta=1 - share, temperature=heat))
    whole = kd(student, teacher, classes, DistillSettings(temperature=heat))
    assert float(both) == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "dkd", "feature"])
@pytest.mark.parametrize("steps", [["prune", "finetune", "speedup"], ["prune", "speedup", "finetune"]])
def test_every_method_before_and_after_the_speedup(dense, tmp_path, method, steps):
    recipe = recipe_from_dict(TREE).with_values({"distill.method": method, "distill.weight": 0.5, "steps": steps})
    metrics = compress(recipe, tmp_path / "a", dense)
    assert metrics["relative_error"] < 1e-5
    assert metrics["accuracy"] > 0.6
    alone = compress(recipe.with_values({"distill.method": "none"}), tmp_path / "b", dense)
    assert metrics["macs"] == alone["macs"]
    one, two = ((tmp_path / name / "compact.safetensors").read_bytes() for name in "ab")
    assert one != two  # the teacher was heard


def test_features_are_compared_on_the_channels_that_are_kept(dense):
    recipe = recipe_from_dict(TREE).with_values({"distill.method": "feature"})
    data = build_data(recipe)
    loop = Loop(recipe, data, "test")
    model = dense_model(recipe, data, dense.path)
    from nni_plugins.channels import ChannelGraph

    pruned = prune(recipe, model, loop, ChannelGraph.watch(model, data.example))
    channels = kept_channels(pruned.plan)
    assert channels["layer2.0.conv1"].tolist() == pruned.plan.kept["layer2.0.conv1"].tolist()
    teacher = build_teacher(recipe, loop, lambda: dense_model(recipe, data, dense.path))
    step = Distillation(recipe, loop, teacher, pruned.plan)
    assert "layer2.0.bn1" in step.layers
    batch = next(iter(data.train))
    with torch.no_grad():
        unpruned = dense_model(recipe, data, dense.path).eval()
        same = step(batch, unpruned) - loop.training_step(batch, unpruned)
        assert float(same) == pytest.approx(0, abs=1e-6)
        assert float(step(batch, model.eval()) - loop.training_step(batch, model)) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Sequence(nn.Module):
    """Channels second in three dimensions, last in four, and of a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.up, self.line, self.head = nn.ConvTranspose1d(12, 20, 2, 2), nn.Linear(20, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.up(self.norm(self.conv(x.squeeze(1))).relu()).relu()  # [batch, 20, 16]
        x = self.line(x.transpose(1, 2).unsqueeze(1)).relu()
        return self.head(x.mean((1, 2)))


def test_features_have_their_channels_where_their_module_has_them():
    from nni_plugins.channels import ChannelGraph

    recipe = recipe_from_dict(TREE).with_values({"distill.method": "feature"})
    data = build_data(recipe)
    loop, model = Loop(recipe, data, "test"), Sequence()
    graph = ChannelGraph.watch(model, data.example)
    teacher = Sequence()
    teacher.load_state_dict(model.state_dict())
    pruned = prune(recipe, model, loop, graph)
    for name in ("conv", "norm", "up", "line"):
        chosen = recipe.with_values({"distill.layers": [name]})
        step = Distillation(chosen, loop, teacher, pruned.plan)
        with torch.no_grad():
            assert float(step(next(iter(data.train)), model)) > 0
    channels = kept_channels(pruned.plan)
    assert {name: kept.tolist() for name, kept in channels.items()} == {
        name: pruned.plan.kept["conv" if name == "norm" else name].tolist() for name in ("conv", "norm", "up", "line")
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distill.layers": ["layer9"]}, r"distill\.layers: the model has no module layer9"),
        ({"distill.teacher": "nothing:net", "distill.method": "kd"}, r"distill\.teacher is nothing:net"),
        ({"distill.teacher": "nothing:net"}, r"distill\.teacher is nothing:net"),
        ({"prune.pruner": "nni:L1NormPruner", "prune.target": "channels"}, "needs to know which channels are kept"),
    ],
)
def test_wrong_settings_are_one_line(dense, tmp_path, changes, says):
    recipe = recipe_from_dict(TREE).with_values({"distill.method": "feature", **changes})
    with pytest.raises(RecipeError, match=says) as error:
        compress(recipe, tmp_path, dense)
    assert "\n" not in str(error.value)


def test_a_model_of_one_number_has_no_classes_to_teach():
    recipe = recipe_from_dict(TREE).with_values(
        {"distill.method": "kd", "train.loss": "torch.nn.functional:mse_loss", "train.metric": "mse"}
    )
    loop = Loop(recipe, build_data(recipe), "test")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(CompressionError, match="one number, whose softmax is always 1; take feature"):
        Distillation(recipe, loop, model)(next(iter(loop.data.train)), model)


def test_another_teacher(dense, tmp_path):
    (tmp_path / "big.py").write_text(
        "from nni_plugins.training.models.resnet import resnet8\n"
        "def net(width):\n    return resnet8((1, 8, 8), 10, width)\n"
    )
    recipe = recipe_from_dict({**TREE, "folder": str(tmp_path)}).with_values(
        {"distill.method": "kd", "distill.teacher": "big:net", "distill.teacher_arguments": {"width": 12}}
    )
    assert compress(recipe, tmp_path / "out", dense)["accuracy"] > 0.5
