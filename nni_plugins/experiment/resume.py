"""What goes on with a stopped experiment: its configuration as NNI stored it, with what the command line changes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.trials import profile_from_database

if TYPE_CHECKING:
    from nni_plugins.experiment.manifest import Known


def load_stopped(known: Known, trials: int | None = None, concurrency: int | None = None) -> Any:
    """NNI's configuration of a stopped experiment, to go on with it.

    Parameters
    ----------
    known
        The experiment.
    trials, concurrency
        In place of its ``maxTrialNumber`` and ``trialConcurrency``, from now on.

    Raises
    ------
    ExperimentError
        When it still runs, or its configuration cannot be read.
    """
    from nni.experiment.launcher import get_stopped_experiment_config

    if known.port is not None:
        raise ExperimentError(
            f"experiment {known.id} still runs on port {known.port}; `nnictl stop {known.id}` stops it"
        )
    kind = profile_from_database(known.folder)["params"].get("experimentType", "hpo")
    if kind != "hpo":
        raise ExperimentError(
            f"experiment {known.id} is an architecture search; give its folder too: "
            f"nni-plugins run FOLDER --resume {known.id}"
        )
    changes = {"maxTrialNumber": trials, "trialConcurrency": concurrency}
    change_stored(known.folder, {name: value for name, value in changes.items() if value is not None})
    try:
        return get_stopped_experiment_config(known.id, known.folder.parent)
    except Exception as error:
        raise ExperimentError(
            f"{known.folder}: its configuration cannot be read ({' '.join(str(error).split())})"
        ) from None


def change_stored(experiment: Path, changes: Mapping[str, Any]) -> None:
    """Change the configuration that NNI stored of a stopped experiment: on resume it reads no other.

    Raises
    ------
    ExperimentError
        When its database cannot be written.
    """
    if not changes:
        return
    params = {**profile_from_database(experiment)["params"], **changes}
    try:
        with closing(sqlite3.connect(experiment / "db" / "nni.sqlite", timeout=5)) as database, database:
            last = "select max(revision) from ExperimentProfile"
            database.execute(f"update ExperimentProfile set params = ? where revision = ({last})", [json.dumps(params)])
    except sqlite3.Error as error:
        raise ExperimentError(f"{experiment}: NNI's database cannot be written ({error})") from None
