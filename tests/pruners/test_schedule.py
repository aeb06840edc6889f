import pytest

from nni_plugins.pruners.schedule import Schedule, as_schedule


def test_one_shot_is_all_at_once():
    schedule = Schedule(interval_steps=30)
    assert [schedule.time_at(step) for step in (29, 30, 31, 60)] == [None, 1, None, None]
    assert schedule.fraction(1) == 1.0
    assert schedule.total_steps == 30


def test_linear_and_cubic_fractions():
    assert [Schedule("linear", times=4).fraction(t) for t in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert [Schedule("cubic", times=2).fraction(t) for t in (1, 2)] == [0.875, 1.0]


def test_times_are_due_at_their_steps_after_the_start():
    schedule = Schedule("linear", times=3, interval_steps=5, start_step=10)
    due = {step: schedule.time_at(step) for step in range(40) if schedule.time_at(step)}
    assert due == {15: 1, 20: 2, 25: 3}
    assert schedule.total_steps == 25


def test_schedules_from_names_and_dictionaries():
    assert as_schedule(None) == Schedule()
    assert as_schedule("linear").shape == "linear"
    assert as_schedule({"shape": "cubic", "times": 3}).times == 3
    with pytest.raises(ValueError, match=r"schedule\.shape is 'square'"):
        as_schedule("square")
    with pytest.raises(ValueError, match="0 times"):
        Schedule("linear", times=0)
