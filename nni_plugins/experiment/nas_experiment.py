"""NNI's NasExperiment, run so that somebody can watch: the strategy in a thread, the manager by itself.

NNI's own runs the strategy in the main thread, and returns when it is over.
"""

import logging
import threading
from pathlib import Path
from typing import Any

from nni.experiment import RunMode
from nni.experiment.config import ExperimentConfig
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig as NniConfig

from nni_plugins.experiment.manager import Manager
from nni_plugins.experiment.nas_strategy import Finished, recall
from nni_plugins.experiment.trials import ENDED

JOIN_SECONDS = 15.0


class NasExperimentConfig(NniConfig):
    """NNI's configuration, with a trial command and a folder of our own.

    It has NNI's name, which is how NNI knows that it needs no tuner.
    """

    def _canonicalize(self, parents: Any) -> None:
        self.search_space: Any = {}
        ExperimentConfig._canonicalize(self, parents)


class WatchedNasExperiment(NasExperiment):
    """A NAS experiment whose strategy runs beside whoever follows it.

    Attributes
    ----------
    failure
        What the strategy died of.
    over
        Whether the strategy has submitted its last model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failure: BaseException | None = None
        self.over = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start_watched(self, port: int, finished: Finished = ()) -> None:
        """Start the manager, and the strategy in a thread.

        Parameters
        ----------
        port
            Of NNI's web page.
        finished
            Trials of this experiment that an earlier process made, which the strategy is told of.
        """
        if finished:
            self._action = "resume"
        self._start_logging(False)
        self._start_nni_manager(port, False, RunMode.Detach)
        config = self.config.canonical_copy()
        self._engine = self.execution_engine_factory(config.execution_engine)
        self._exec_model_space = self.executable_model_factory(config.model_format)
        self.strategy.initialize(self._exec_model_space, self._engine)
        recall(self.strategy, finished)
        self._send_space_to_nni_manager()
        self._thread = threading.Thread(target=self._explore, name="nas-strategy", daemon=True)
        self._thread.start()

    def _explore(self) -> None:
        try:
            self.strategy.run()
        except BaseException as error:  # SystemExit too: nobody else would hear of it
            if not self._stopping:
                self.failure = error
                logging.getLogger("nni.nas").exception("the strategy died")
        finally:
            self.over = True

    def stop(self) -> None:
        """Stop the manager, then the strategy and NNI's listener."""
        self._stopping = True
        self._stop_nni_manager()
        engine: Any = self._engine
        if engine is not None:
            engine._stopped = True
            engine._channel_listen_stop_event.set()
            engine._channel_listen_thread.join(JOIN_SECONDS)
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
        self._stop_logging()


class StrategyManager(Manager):
    """The manager of a watched experiment: NNI's word, and what becomes of the strategy, of which NNI knows nothing."""

    def __init__(self, port: int, experiment: WatchedNasExperiment, folder: Path | None = None) -> None:
        super().__init__(port, folder=folder)
        self._experiment = experiment

    def status(self) -> tuple[str, list[str]]:
        """NNI's word; ``ERROR`` when the strategy died, ``DONE`` when it has no more to try and all trials ended."""
        status, errors = super().status()
        failure, experiment = self._experiment.failure, self._experiment
        listener = getattr(experiment._engine, "_channel_listen_thread", None)
        if failure is None and listener is not None and not listener.is_alive() and status == "RUNNING":
            return "ERROR", ["its strategy hears no more of NNI's manager; see the first lines on standard error"]
        if failure is not None:
            return "ERROR", [f"its strategy died ({type(failure).__name__}: {' '.join(str(failure).split())})"]
        if experiment.over and status in ("RUNNING", "TUNER_NO_MORE_TRIAL"):
            waiting = getattr(experiment._engine, "_submitted_cache", {})
            trials = self.trials()
            if trials and not waiting and all(trial.status in ENDED for trial in trials):
                return "DONE", errors
        return status, errors
