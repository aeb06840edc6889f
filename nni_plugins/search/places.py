"""Where the process that NNI starts for a tuner finds its experiment.

NNI's manager starts ``python -m nni --exp_params BASE64`` in the experiment's log folder, and names that folder and
the one for checkpoints in the environment. The arguments hold the whole configuration but the search space; they are
the same when the experiment is resumed.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["checkpoint_folder", "experiment_config", "experiment_folder", "trial_code_directory"]


def checkpoint_folder() -> Path | None:
    """Return the folder that a tuner's state outlives the manager in; None outside an experiment."""
    named = os.environ.get("NNI_CHECKPOINT_DIRECTORY")
    return Path(named) if named and Path(named).is_dir() else None


def experiment_folder() -> Path | None:
    """Return the experiment's folder, the parent of its checkpoints and logs; None outside an experiment."""
    for variable in ("NNI_CHECKPOINT_DIRECTORY", "NNI_LOG_DIRECTORY"):
        named = os.environ.get(variable)
        if named and Path(named).is_dir():
            return Path(named).parent
    return None


def experiment_config() -> dict[str, Any]:
    """Return the experiment's configuration, spelled as NNI does (``trialCodeDirectory``); empty outside one."""
    if "--exp_params" not in sys.argv[:-1]:
        return {}
    try:
        found = json.loads(base64.b64decode(sys.argv[sys.argv.index("--exp_params") + 1]))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def trial_code_directory() -> Path:
    """Return where trials run, and relative paths of a tuner's arguments start; outside NNI, the working folder."""
    named = experiment_config().get("trialCodeDirectory")
    return Path(named) if named else Path.cwd()
