"""NNI's local and remote services give a trial the parameters of another one.

``V3asV1`` (training_service/v3/compat.js) puts parameters in a queue and hands the first of them to whichever trial
asks first, while manager, database and web page keep the pairing of the order of submission. When two trials start
together, the wrong one is shown, the tuner hears of the end of parameters that still run, and TPE dies of a
``KeyError``: the experiment stays in RUNNING for ever and starts no more trials. A trial that dies before it asks
shifts all others.

The manager's own pairing is right, and its REST API tells it: a trial takes its parameters from there. It still asks
the queue first, so that every trial takes one away.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

from nni_plugins.compat.hook import Patch

QUEUE = "this.parameters.shift()"
PATIENCE_SECONDS = 10.0
MARK = "_nni_plugins_asks_manager"


def _defect(module: Any) -> bool:
    spec = importlib.util.find_spec("nni_node")
    if spec is None or not spec.submodule_search_locations:
        return False
    service = Path(next(iter(spec.submodule_search_locations)), "training_service", "v3", "compat.js")
    queued = service.is_file() and QUEUE in service.read_text(encoding="utf-8")
    return queued and not hasattr(module.TrialCommandChannelV3.receive_parameter, MARK)


def _mend(module: Any) -> None:
    original = module.TrialCommandChannelV3.receive_parameter

    @functools.wraps(original)
    def receive_parameter(self: Any) -> Any:
        queued = original(self)
        return stored_record(module.nni.load) or queued

    setattr(receive_parameter, MARK, True)
    module.TrialCommandChannelV3.receive_parameter = receive_parameter


def stored_record(load: Any = json.loads) -> Any:
    """Return the parameters that the manager has stored for this trial, or None where it cannot be asked.

    Parameters
    ----------
    load
        Decodes NNI's JSON.
    """
    import requests

    manager, found, _ = os.environ.get("NNI_TRIAL_COMMAND_CHANNEL", "").partition("/env/")
    trial = os.environ.get("NNI_TRIAL_JOB_ID")
    if not found or not trial or os.environ.get("NNI_PLATFORM") != "local":
        return None  # on a remote machine the channel ends at NNI's trial keeper, which has no such API
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            answer = requests.get(f"{manager}/api/v1/nni/trial-jobs/{trial}", timeout=5)
            records = answer.json().get("hyperParameters") if answer.ok else None
        except (requests.RequestException, ValueError, AttributeError):
            records = None
        if records:
            return load(records[-1])
        time.sleep(0.2)  # the manager stores a trial only after it has started it
    return None


PATCH = Patch(
    name="trial-parameters",
    module="nni.runtime.trial_command_channel.v3",
    mends="trials that start together get each other's parameters, and TPE dies of a KeyError",
    defect=_defect,
    mend=_mend,
)
