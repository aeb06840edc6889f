"""NNI's manager tells a resumed NAS experiment of its earlier results, and the listener of NAS dies of hearing it.

The command is one of those that only tuners know. What the listener does not know is passed over, without being read:
a strategy is told of earlier trials in another way.
"""

from __future__ import annotations

import functools
from typing import Any

from nni_plugins.compat.hook import Patch

UNKNOWN = ("ImportData", "AddCustomizedTrialJob", "Ping")


class _Stub:
    """A connection over which one command of a tuner comes, and then the end."""

    def __init__(self, command: str) -> None:
        self.commands = [{"type": command, "content": "[]"}]

    def receive(self) -> Any:
        """Give the next command."""
        return self.commands.pop(0) if self.commands else None


def _defect(module: Any) -> bool:
    channel = module.TunerCommandChannel.__new__(module.TunerCommandChannel)
    channel._channel = _Stub(module.CommandType.ImportData.value)
    try:
        channel.receive()
    except ValueError:
        return True
    return False


def _mend(module: Any) -> None:
    kind = module.TunerCommandChannel
    theirs = kind._receive
    passed_over = [getattr(module.CommandType, name) for name in UNKNOWN if hasattr(module.CommandType, name)]

    listener = kind.receive

    @functools.wraps(theirs)
    def receive_any(self: Any) -> Any:
        while True:
            command, content = theirs(self)
            if command not in passed_over or not self.__dict__.get("_for_nas"):
                return command, content  # the dispatcher of tuners reads from here too, and needs them

    @functools.wraps(listener)
    def receive(self: Any) -> Any:
        self._for_nas = True
        try:
            return listener(self)
        finally:
            self._for_nas = False

    kind._receive = receive_any
    kind.receive = receive


PATCH = Patch(
    name="nas-resume",
    module="nni.runtime.tuner_command_channel.channel",
    mends="a resumed NasExperiment hears nothing more of its trials ('Unknown command type: CommandType.ImportData')",
    defect=_defect,
    mend=_mend,
)
