"""NNI's dispatcher after a resume: results that come before it knows the trials of before."""

from __future__ import annotations

from typing import Any

import pytest

import nni_plugins  # noqa: F401  (arms the patches)


def test_a_result_that_comes_too_early_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import nni.runtime.msg_dispatcher as theirs
    from nni.tuner import Tuner

    class Listener(Tuner):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[Any] = []

        def import_data(self, data: Any) -> None:
            self.heard += data

        def receive_trial_result(self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any) -> None:
            self.heard.append((parameter_id, value))

        def generate_parameters(self, parameter_id: int, **kwargs: Any) -> Any:
            return {"x": parameter_id}

    tuner = Listener()
    dispatcher = theirs.MsgDispatcher("ws://_unittest_placeholder_", tuner)
    dispatcher.send = lambda *_: None
    final = {"type": "FINAL", "sequence": 0, "trial_job_id": "abc"}
    dispatcher.handle_report_metric_data({**final, "parameter_id": 905, "value": "0.5"})
    assert tuner.heard == []
    monkeypatch.setattr(theirs, "dispatcher_env_vars", theirs.dispatcher_env_vars._replace(NNI_MODE="resume"))
    sent: list[Any] = []
    dispatcher.send = lambda *item: sent.append(item)
    dispatcher.handle_request_trial_jobs(1)  # in the place of the one that has ended
    assert sent == []
    dispatcher.handle_add_customized_trial([{"parameter_id": 905, "parameters": {"x": 1}}])
    assert tuner.heard == [{"parameter": {"x": 1}, "value": 0.5}]
    assert len(sent) == 1  # under an id that no trial of before has
    dispatcher.handle_report_metric_data({**final, "parameter_id": 906, "value": "0.25"})
    assert tuner.heard[1:] == [(906, 0.25)]


def test_the_dispatcher_of_tuners_hears_of_earlier_trials() -> None:
    """What a NAS listener passes over must reach a tuner: without it, a resumed search loses trials and repeats ids."""
    from nni.runtime.tuner_command_channel.channel import TunerCommandChannel
    from nni.runtime.tuner_command_channel.command_type import CommandType

    class Connection:
        def __init__(self) -> None:
            wanted = (CommandType.ImportData, CommandType.AddCustomizedTrialJob, CommandType.Ping)
            self.commands = [{"type": command.value, "content": "[]"} for command in wanted]

        def receive(self) -> Any:
            return self.commands.pop(0) if self.commands else None

    channel = TunerCommandChannel.__new__(TunerCommandChannel)
    channel._channel = Connection()
    assert [channel._receive()[0] for _ in range(3)] == [
        CommandType.ImportData,
        CommandType.AddCustomizedTrialJob,
        CommandType.Ping,
    ]
