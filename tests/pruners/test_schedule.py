import pytest
import torch
from torch import nn

from nni_plugins.pruners import MagnitudePruner, PruningError, TaylorPruner
from nni_plugins.pruners.schedule import Schedule, as_schedule

from .resuming import assert_resumes
from .trainers import lightning, transformers

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def test_one_shot_is_all_at_once():
    schedule = Schedule(interval_steps=30)
    assert [schedule.time_at(step) for step in (29, 30, 31, 60)] == [None, 1, None, None]
    assert schedule.fraction(1) == 1.0
    assert schedule.total_steps == 30


def test_linear_and_cubic_fractions():
    assert [Schedule("linear", times=4).fraction(t) for t in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert [Schedule("cubic", times=2).fraction(t) for t in (1, 2)] == [0.875, 1.0]


def due_steps(schedule):
    return {step: schedule.time_at(step) for step in range(-10, 60) if schedule.time_at(step)}


def test_times_are_due_at_their_steps_after_the_start():
    schedule = Schedule("linear", times=3, interval_steps=5, start_step=10)
    assert due_steps(schedule) == {15: 1, 20: 2, 25: 3}
    assert schedule.total_steps == 25
    assert [schedule.next_due(step) for step in (0, 14, 15, 24, 25)] == [15, 15, 20, 25, None]


def test_iterative_prunes_first_and_recovers_last():
    schedule = Schedule("iterative", times=3, interval_steps=5, start_step=10)
    assert due_steps(schedule) == {10: 1, 15: 2, 20: 3}
    assert schedule.total_steps == 25
    assert [schedule.fraction(time) for time in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert due_steps(Schedule("iterative", times=2, interval_steps=4)) == {1: 1, 5: 2}


def test_epochs_become_steps_once_their_length_is_known():
    waiting = Schedule("linear", times=2, interval_epochs=1.5, start_epoch=1)
    assert waiting.waits
    assert (waiting.first_epoch, waiting.total_epochs) == (2.5, 4)
    with pytest.raises(PruningError, match="give it steps_per_epoch"):
        _ = waiting.total_steps
    schedule = waiting.with_epochs_of(10)
    assert not schedule.waits
    assert due_steps(schedule) == {25: 1, 40: 2}
    assert Schedule("iterative", times=2, interval_epochs=2, start_epoch=1, steps_per_epoch=7).due_step(2) == 21


def test_schedules_from_names_and_dictionaries():
    assert as_schedule(None) == Schedule()
    assert as_schedule("linear").shape == "linear"
    assert as_schedule({"shape": "cubic", "times": 3}).times == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "square"}, r"schedule\.shape is 'square'"),
        ({"shape": "linear", "times": 0}, "0 times"),
        ({"times": 1.5}, r"schedule\.times is 1\.5"),
        ({"interval_epochs": 0}, "interval_epochs must be more than 0"),
        ({"interval_epochs": "1"}, r"schedule\.interval_epochs is '1'"),
        ({"interval_epochs": 1, "interval_steps": 5}, "steps and epochs"),
        ({"start_epoch": 1}, "without interval_epochs"),
        ({"interval_epochs": 1, "steps_per_epoch": 0}, r"schedule\.steps_per_epoch is 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(fields, message):
    with pytest.raises(PruningError, match=message) as error:
        as_schedule(fields)
    assert "\n" not in str(error.value)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


class Watched(MagnitudePruner):
    """Remembers after which steps it has pruned, and what was left."""

    def prune(self, fraction=1.0):
        masks = super().prune(fraction)
        self.__dict__.setdefault("seen", {})[self._step] = sum(len(units) for units in self.plan.kept.values())
        return masks


def test_epochs_are_counted_with_a_torch_evaluator(digits, make_evaluator):
    """150 images make 2 batches of 64: an epoch has 2 steps, which only the training function knows."""
    images = digits[0][:150]
    for compress in ({}, {"max_epochs": 5}):
        model = net()
        evaluator = make_evaluator(model, images=images)
        schedule = {"shape": "linear", "times": 2, "interval_epochs": 2}
        pruner = Watched(model, CONFIG, evaluator, schedule=schedule)
        pruner.compress(**compress)
        assert pruner.seen == {4: 12, 8: 8}
        assert evaluator.steps == ([2, 8] if compress else [2, 6])
        assert pruner.finished


def test_masks_are_due_at_the_end_of_the_counted_epoch(digits, make_evaluator):
    model = net()
    evaluator = make_evaluator(model, images=digits[0][:150])
    pruner = Watched(model, CONFIG, evaluator, schedule={"shape": "iterative", "times": 2, "interval_epochs": 1, "start_epoch": 1})  # fmt: skip
    pruner.compress()
    assert pruner.seen == {2: 12, 4: 8}
    assert evaluator.steps == [2, 4]


def test_epochs_that_cannot_be_counted_are_asked_for(digits, make_evaluator):
    model = net()
    early = {"shape": "linear", "times": 4, "interval_epochs": 0.5}
    pruner = Watched(model, CONFIG, make_evaluator(model, images=digits[0][:150]), schedule=early)
    with pytest.raises(PruningError, match=r"masks at epoch 0\.5, before an epoch's steps are counted"):
        pruner.compress()
    with pytest.raises(PruningError, match="does not say how many steps"):
        pruner.compress(max_steps=4)
    pruner.unwrap_model()
    known = Watched(model, CONFIG, make_evaluator(model), schedule={**early, "steps_per_epoch": 4})
    known.compress()
    assert list(known.seen) == [2, 4, 6, 8]


def test_iterative_trains_after_the_last_masks(make_evaluator):
    model = net()
    evaluator = make_evaluator(model)
    pruner = Watched(model, CONFIG, evaluator, schedule={"shape": "iterative", "times": 2, "interval_steps": 3})
    pruner.compress()
    assert pruner.seen == {1: 12, 4: 8}
    assert evaluator.steps == [7]
    assert pruner.finished


@pytest.mark.parametrize("at", [5, 6])
def test_iterative_resumes_in_its_last_recovery(at, digits, tmp_path):
    def pruner(model, evaluator):
        return TaylorPruner(
            model, CONFIG, evaluator, 2, schedule={"shape": "iterative", "times": 2, "interval_steps": 3}
        )

    assert_resumes(net, pruner, digits, tmp_path / "state.pt", at)


def test_an_epochs_length_is_part_of_the_state(digits, make_evaluator):
    model = net()
    schedule = {"shape": "linear", "times": 2, "interval_epochs": 2}
    pruner = Watched(model, CONFIG, make_evaluator(model, images=digits[0][:150]), schedule=schedule)
    pruner.compress()
    other = Watched(net(), CONFIG, make_evaluator(net()), schedule=schedule)
    other.load_state_dict(pruner.state_dict())
    assert other.schedule.steps_per_epoch == 2


def test_lightning_knows_its_epochs(digits, tmp_path):
    model, evaluator = lightning((digits[0][:160], digits[1][:160]), tmp_path, accumulate_grad_batches=2)
    pruner = Watched(model, CONFIG, evaluator, schedule={"shape": "linear", "times": 4, "interval_epochs": 0.5})
    pruner.compress()
    assert pruner.schedule.steps_per_epoch == 3  # 5 batches, two of which are one step
    assert list(pruner.seen) == [2, 3, 5, 6]


def test_transformers_knows_its_epochs(tmp_path):
    model, evaluator = transformers(tmp_path)
    config = [{"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}]
    inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    schedule = {"shape": "linear", "times": 2, "interval_epochs": 1}
    pruner = Watched(model, config, evaluator, schedule=schedule, dummy_input=inputs)
    pruner.compress()
    assert pruner.schedule.steps_per_epoch == 4
    assert pruner.seen == {4: 24, 8: 16}
