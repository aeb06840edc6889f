"""One running NNI manager, over its REST API (``/api/v1/nni``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.trials import Trial, from_rest


class Manager:
    """The manager that listens on `port` of this machine.

    Parameters
    ----------
    port
        The port that it was started on.
    prefix
        The ``urlPrefix`` of the experiment, if it has one.
    timeout
        Seconds to wait for one answer.
    folder
        The experiment's folder, where its trials' files are looked for.
    """

    def __init__(self, port: int, prefix: str | None = None, timeout: float = 20.0, folder: Path | None = None) -> None:
        self.port = port
        self.folder = folder
        self.timeout = timeout
        path = "/".join(part.strip("/") for part in (prefix or "", "api/v1/nni") if part)
        self.url = f"http://127.0.0.1:{port}/{path}"

    def get(self, path: str) -> Any:
        """The answer to ``GET path``, decoded.

        Raises
        ------
        ExperimentError
            When nothing of NNI's answers there.
        """
        try:
            response = requests.get(f"{self.url}/{path.lstrip('/')}", timeout=self.timeout)
            response.raise_for_status()
            return response.json()
        except (requests.RequestException, ValueError) as error:
            raise ExperimentError(f"no NNI manager answers on port {self.port} ({type(error).__name__})") from None

    def status(self) -> tuple[str, list[str]]:
        """NNI's word for the state (``RUNNING``, ``DONE``, ``ERROR`` …) and its error messages."""
        answer = self.get("check-status")
        return answer["status"], [str(error) for error in answer.get("errors") or []]

    def profile(self) -> dict[str, Any]:
        """The experiment's profile: ``id``, ``params`` (its configuration), ``startTime``, ``execDuration`` …"""
        return self.get("experiment")

    def trials(self) -> list[Trial]:
        """Every trial so far, by number."""
        return from_rest(self.get("trial-jobs"), self.folder)


def experiment_on(port: int) -> str | None:
    """The id of the NNI experiment that answers on `port`, or ``None`` when something else does, or nothing."""
    try:
        return str(Manager(port, timeout=3.0).profile()["id"])
    except (ExperimentError, KeyError, TypeError):
        return None
