"""What NNI's NAS needs: commands that only tuners know are passed over, and importing its layers says nothing."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

from nni.runtime.tuner_command_channel import channel
from nni.runtime.tuner_command_channel.command_type import CommandType, RequestTrialJobs

from nni_plugins.compat.defects import nas_layers, nas_resume


class Wire:
    def __init__(self, *commands: tuple[CommandType, str]) -> None:
        self.commands = [{"type": kind.value, "content": content} for kind, content in commands]

    def receive(self) -> Any:
        return self.commands.pop(0)


def test_a_resumed_search_hears_what_comes_after_the_earlier_results() -> None:
    assert nas_resume.PATCH.state == "applied"
    assert not nas_resume.PATCH.defect(channel)
    listener = channel.TunerCommandChannel.__new__(channel.TunerCommandChannel)
    results = '[{"parameter": {"not": "a model"}, "value": 1}]'
    listener._channel = Wire((CommandType.ImportData, results), (CommandType.RequestTrialJobs, "2"))
    received = listener.receive()
    assert isinstance(received, RequestTrialJobs)
    assert received.count == 2


def test_importing_the_layers_warns_of_nothing() -> None:
    import nni.nas.nn.pytorch  # noqa: F401

    assert nas_layers.PATCH.state == "applied"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        undo = nas_layers.PATCH.before(ModuleType("nothing"))
        warnings.warn("<class 'Buffer'> is found to be not a nn.Module, which is unexpected", RuntimeWarning)
        warnings.warn("other", RuntimeWarning)
        assert undo is not None
        undo()
        warnings.warn("later: is found to be not a nn.Module", RuntimeWarning)
    assert [str(one.message)[:5] for one in seen] == ["other", "later"]
