"""From ``config.yml`` to a running NNI manager, and its orderly stop.

This is what ``nnictl create --config config.yml`` does, with this process's interpreter for the trials, a clear line
for what goes wrong, and a stop that leaves a state which ``nnictl resume`` accepts.
"""

from __future__ import annotations

import logging
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_plugins.experiment.alone import manager_of
from nni_plugins.experiment.config_check import check_content, read_config, reason_of
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.health import why_stopped, why_waiting
from nni_plugins.experiment.logs import tuner_error
from nni_plugins.experiment.machines import Found, Machine, check_machines, host_keys, machines_of, own_facts
from nni_plugins.experiment.manager import Manager, experiment_on
from nni_plugins.experiment.manifest import manifest_path
from nni_plugins.experiment.node import LOOPBACK, preloaded

START_SECONDS = 90.0
"""NNI gives its web server four seconds to start, which a busy machine does not keep."""
CHECKED_TUNERS = ("TPE", "Random", "GridSearch", "Anneal", "Evolution")


@dataclass(frozen=True)
class Running:
    """An experiment whose manager this process started."""

    id: str
    port: int
    folder: Path
    manager: Manager
    handle: Any
    trials_wanted: int | None
    machines: tuple[Machine, ...] = ()
    listen: str = LOOPBACK

    @property
    def resume_command(self) -> str:
        """How to go on with it after a stop."""
        return f"nni-plugins run --resume {self.id} --port {self.port}"

    def alive(self) -> bool:
        """Whether the manager's process is there."""
        process = self.handle._proc
        return process is not None and process.poll() is None

    def stop(self) -> None:
        """Stop this experiment, by its own manager's REST API, and wait until its process is gone."""
        if not self.alive():
            self.handle._proc = None  # NNI would ask it to stop all the same, and print why that fails
        self.handle.stop()

    def kill(self) -> None:
        """End the manager at once; its trials end within seconds, as when it is killed by somebody else."""
        process = self.handle._proc
        if process is not None:
            process.kill()
            process.wait()
            self.handle._proc = None


def find_config(path: Path) -> Path:
    """The experiment's configuration: `path` itself, or the ``config.yml`` in it."""
    candidates = [path] if path.is_file() else [path / "config.yml", path / "config.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ExperimentError(f"{path}: no experiment here; give a folder with a config.yml, or the file itself")


def load_config(
    path: Path,
    experiments_folder: Path | None = None,
    trials: int | None = None,
    concurrency: int | None = None,
) -> Any:
    """NNI's ``ExperimentConfig`` from a file, with what the command line changes in it.

    Parameters
    ----------
    path
        ``config.yml`` as ``nnictl create`` takes it.
    experiments_folder
        In place of ``experimentWorkingDirectory``.
    trials, concurrency
        In place of ``maxTrialNumber`` and ``trialConcurrency``.

    Raises
    ------
    ExperimentError
        When NNI refuses it; with NNI's reason.
    """
    content = read_config(path)
    check_content(content, path)
    from nni.experiment.config import ExperimentConfig, utils

    utils.unset_base_path()  # NNI leaves it set after a file that it refused, and then refuses every other one
    try:
        config = ExperimentConfig.load(path)
        if experiments_folder is not None:
            config.experiment_working_directory = str(experiments_folder.expanduser().resolve())
        if trials is not None:
            config.max_trial_number = trials
        if concurrency is not None:
            config.trial_concurrency = concurrency
        if getattr(config.training_service, "platform", None) == "remote":
            config.nni_manager_ip = LOOPBACK  # workers come back through their SSH connection
            for one in config.training_service.machine_list:
                one.host = str(one.host).removeprefix("[").removesuffix("]")  # as IPv6 addresses are written
        else:
            config.trial_command = own_interpreter(config.trial_command)
        config = config.canonical_copy()
        config.validate()
        _check_space(config)
        _check_recipe(config, path)
        _check_tuner(config, path)
    except ExperimentError:
        raise
    except Exception as error:  # NNI raises whatever comes: AttributeError, AssertionError, TypeError, ValueError
        raise ExperimentError(f"{path}: NNI refuses this configuration: {reason_of(error)}") from None
    return config


def _check_space(config: Any) -> None:
    """Raise where one of NNI's tuners would die of the search space: the manager goes on without it, for ever."""
    from nni.common.hpo_utils.validation import validate_search_space

    if config.search_space is None or getattr(config.tuner, "name", None) not in CHECKED_TUNERS:
        return
    try:
        validate_search_space(config.search_space, raise_exception=True)
    except ValueError as error:
        if "(choice)" not in str(error):  # lists and null are more than NNI's check knows, and work
            raise


def _check_recipe(config: Any, path: Path) -> None:
    """Try the search space on the recipe that the trials read, before any of them starts."""
    from nni_plugins.search.errors import SearchError
    from nni_plugins.search.spaces import check_against, check_space
    from nni_plugins.training.errors import RecipeError
    from nni_plugins.training.recipe import load_recipe

    recipe = recipe_of(config.trial_command, config.trial_code_directory)
    if recipe is None:
        return
    source = Path(config.search_space_file).name if config.search_space_file else "searchSpace"
    try:
        loaded = load_recipe(recipe)
        if config.search_space is not None:
            check_against(check_space(config.search_space, source), loaded, source)
    except (RecipeError, SearchError) as error:
        raise ExperimentError(f"{path}: {error}") from None


def _check_tuner(config: Any, path: Path) -> None:
    """Check the arguments of a tuner of ours: NNI would start it, fail, and say that it did not connect."""
    from nni_plugins.search.errors import SearchError
    from nni_plugins.search.registration import check_tuner

    tuner = config.tuner
    if tuner is None:
        return
    try:
        check_tuner(
            getattr(tuner, "name", None), getattr(tuner, "class_name", None), getattr(tuner, "class_args", None)
        )  # fmt: skip
    except SearchError as error:
        raise ExperimentError(f"{path}: tuner: {error}") from None


def recipe_of(command: str | None, folder: str | Path | None) -> Path | None:
    """Return the recipe of ``python -m nni_plugins.trial recipe.yml``; None where trials run something else."""
    words = shlex.split(command or "")
    if "nni_plugins.trial" not in words[:-1]:
        return None
    given = next((word for word in words[words.index("nni_plugins.trial") + 1 :] if not word.startswith("-")), None)
    return None if given is None else Path(folder or ".") / given


def own_interpreter(command: str | None) -> str | None:
    """`command` with a leading ``python`` replaced by the interpreter of this process.

    Trials then find this package however the shell's ``PATH`` is set, also when the experiment is resumed later.
    """
    if command is None:
        return None
    executable = f'"{sys.executable}"' if sys.platform == "win32" else shlex.quote(sys.executable)
    return re.sub(r"^python3?(\.exe)?(?=\s)", lambda _: executable, command)


def check_port(port: int) -> None:
    """Raise a one-line error when `port` cannot be had."""
    if not 0 < port < 65536:
        raise ExperimentError(f"port {port} does not exist; choose one between 1024 and 65535 with --port")
    with socket.socket() as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except PermissionError:
            raise ExperimentError(f"port {port} is reserved; choose one above 1023 with --port") from None
        except OSError:
            other = experiment_on(port)
            owner = f"NNI's experiment {other}" if other else "another program"
            raise ExperimentError(f"port {port} is taken by {owner}; choose another one with --port") from None


def check_home() -> None:
    """Raise where NNI cannot keep its list of experiments, which is in the home folder wherever those are."""
    listed = manifest_path().parent
    try:
        listed.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=listed):
            pass
    except OSError as error:
        raise ExperimentError(
            f"{listed}: NNI keeps its list of experiments there, and cannot write it ({error.strerror}); "
            "set HOME to a folder that can be written"
        ) from None


def look_at_machines(config: Any) -> list[Found]:
    """Check the machines that trials will run on; see :func:`nni_plugins.experiment.machines.check_machines`.

    Raises
    ------
    ExperimentError
        When a remote machine cannot run a trial, or this one has fewer GPUs than a trial asks for.
    """
    machines = machines_of(config)
    if machines:
        return check_machines(machines, config.trial_gpu_number)
    if config.trial_gpu_number and getattr(config.training_service, "platform", None) == "local":
        gpus = own_facts()["gpus"]
        if gpus < config.trial_gpu_number:
            raise ExperimentError(
                f"trialGpuNumber asks for {config.trial_gpu_number} GPUs, and NNI sees {gpus} here; "
                "leave it out to let trials choose their device"
            )
    return []


def start(
    config: Any,
    port: int,
    found: Sequence[Found] = (),
    listen: str = LOOPBACK,
    resume: str | None = None,
) -> Running:
    """Start NNI's manager for `config`; it outlives this process unless :meth:`Running.stop` is called.

    Parameters
    ----------
    config
        NNI's configuration.
    port
        Of the web page and REST API.
    found
        The remote machines, as they were found.
    listen
        The address that the manager listens on.
    resume
        Id of the stopped experiment to go on with.

    Raises
    ------
    ExperimentError
        When the port is taken, the folder cannot be written, or the manager does not start; with the reason.
    """
    check_port(port)
    folder = Path(config.experiment_working_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"{folder}: the experiments folder cannot be made ({error.strerror})") from None
    check_home()
    from nni.experiment import Experiment, RunMode

    silence_nni()
    experiment = Experiment(config, id=resume)
    experiment._action = "create" if resume is None else "resume"
    own = folder / experiment.id
    try:
        with _patience(experiment.id), preloaded(listen, host_keys(found) if found else None):
            experiment.start(port, run_mode=RunMode.Detach)
    except Exception as error:
        raise ExperimentError(
            f"NNI's manager did not start: {_one_line(error)}; see {own}/log/nnictl_stderr.log and `nni-plugins doctor`"
        ) from None
    machines = tuple(one.machine for one in found)
    manager = Manager(port, folder=own)
    running = Running(experiment.id, port, own, manager, experiment, config.max_trial_number, machines, listen)
    reason = _early_error(running)
    if reason:
        running.stop()
        raise ExperimentError(f"NNI's manager did not start: {reason}; see {own}/log")
    return running


def silence_nni() -> None:
    """Keep NNI's word in ``log/experiment.log``."""
    import nni

    nni.silence_stdout()
    logger = logging.getLogger("nni.experiment")
    logger.propagate = False
    if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        logger.addHandler(logging.NullHandler())  # without any, Python prints warnings itself


def _early_error(running: Running) -> str:
    """Wait until a trial is there, or a reason why not; returns why the start failed, if it did."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            status, errors = running.manager.status()
            if status == "ERROR" and not running.manager.trials():
                return why_stopped(running.folder, errors) or "NNI does not say why"
            if raised := tuner_error(running.folder):
                return f"the tuner died: {raised}"
            if status != "INITIALIZED" and (running.manager.trials() or why_waiting(running.folder)):
                return ""
        except ExperimentError:
            if not running.alive():
                return why_stopped(running.folder) or "its process is gone"
        time.sleep(0.3)
    return ""


@contextmanager
def _patience(experiment: str | None) -> Iterator[None]:
    """Let NNI wait for its web server as long as a busy machine needs, rather than four seconds, and be sure of it.

    NNI speaks to whatever answers on the port: another experiment's manager, where two start at once. And it starts
    what another manager runs already. Where the experiment's id is None, it is not known yet, and new.
    """
    from nni.experiment import launcher, rest

    start, check = launcher._start_rest_server, launcher._check_rest_server
    begun: list[Any] = []

    def begin(*args: Any, **options: Any) -> Any:
        begun.append(start(*args, **options))
        return begun[-1]

    def wait(port: int, retry: int = 3, url_prefix: str | None = None) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if begun and begun[-1].poll() is not None:
                other = experiment_on(port)
                taken = f"; port {port} is taken by NNI's experiment {other}" if other not in (None, experiment) else ""
                raise RuntimeError(f"its process ended with status {begun[-1].returncode}{taken}")
            try:
                rest.get(port, "/check-status", url_prefix)
            except Exception:
                time.sleep(0.2)
                continue
            if not begun or listens(begun[-1].pid, port):
                break
            time.sleep(0.2)
        else:
            check(port, retry=1, url_prefix=url_prefix)
        if begun and experiment and manager_of(experiment, besides=begun[-1].pid) is not None:
            raise RuntimeError("another manager has started it at the same time, and goes on with it")

    launcher._start_rest_server, launcher._check_rest_server = begin, wait
    try:
        yield
    finally:
        launcher._start_rest_server, launcher._check_rest_server = start, check


def listens(process: int, port: int) -> bool:
    """Whether this process of ours has the port; true also where the system does not say."""
    import psutil

    try:
        found = psutil.Process(process).net_connections("tcp")
    except (psutil.Error, OSError, AttributeError):
        return True
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
