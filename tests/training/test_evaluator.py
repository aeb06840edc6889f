"""The loop as NNI's evaluator: NNI's own pruners and protocol drive it."""

import pytest
import torch

from nni_plugins.training import Loop, build_data, build_model


@pytest.fixture
def parts(small_cnn):
    data = build_data(small_cnn)
    return Loop(small_cnn, data), build_model(small_cnn, data.shape, data.classes, 0)


def evaluator_of(loop):
    from nni_plugins.training.evaluator import RecipeEvaluator

    return RecipeEvaluator(loop)


CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def test_protocol(parts):
    loop, model = parts
    evaluator = evaluator_of(loop)
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    steps, losses = [], []
    evaluator.patch_optimizer_step([lambda: steps.append("before")], [lambda: steps.append("after")])
    evaluator.patch_loss(lambda loss, batch: losses.append(loss.item()) or loss)
    evaluator.train(max_steps=3)
    assert steps == ["before", "after"] * 3
    assert len(losses) == 3
    evaluator.revert_loss()
    evaluator.finetune()
    assert len(losses) == 3
    score, values = evaluator.evaluate()
    assert score == values["accuracy"] == loop.evaluate(model)
    assert evaluator.get_dummy_input().shape == (1, 1, 8, 8)
    evaluator.unbind_model()


def test_nni_taylor_drives_it(parts):
    from nni.compression.pruning import TaylorPruner

    loop, model = parts
    pruner = TaylorPruner(model, CONFIG, evaluator_of(loop), training_steps=4)
    _, masks = pruner.compress()
    assert {name: target["weight"].mean().item() for name, target in masks.items()} == {
        "stage1.conv1": 0.5,
        "stage2.conv1": 0.5,
    }
    pruner.unwrap_model()


def test_nni_slim_and_fusion_drive_it(parts):
    from nni.compression.pruning import AGPPruner, L1NormPruner

    loop, model = parts
    scheduled = AGPPruner(L1NormPruner(model, CONFIG, evaluator_of(loop)), interval_steps=2, total_times=3)
    _, masks = scheduled.compress(max_steps=8, max_epochs=None)
    assert masks["stage2.conv1"]["weight"].mean().item() == pytest.approx(0.5)
    scheduled.unwrap_model()


def test_scores_that_a_pruner_adds_are_not_in_the_recipes_optimizer(parts):
    from nni.compression.pruning import MovementPruner

    loop, model = parts
    evaluator = evaluator_of(loop)
    pruner = MovementPruner(model, CONFIG, evaluator, warmup_step=1, cooldown_begin_step=4)
    pruner.compress(max_steps=6, max_epochs=None)
    pruner.unwrap_model()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
