"""``nni-plugins report`` and ``compare``: find the experiments, wherever they are, and write about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.archive import is_archive, unpacked
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.finish import finish, look
from nni_plugins.experiment.folders import read_json
from nni_plugins.experiment.manifest import Known, find_experiment
from nni_plugins.experiment.write import DATA
from nni_plugins.report.findings import Findings

if TYPE_CHECKING:
    from nni_plugins.report.compare import Comparison

COMPARE = "compare"


@contextmanager
def located(name: str | None, experiments_folder: Path | None = None) -> Iterator[Known]:
    """The experiment of this name: an id, a folder, or an archive of one; the newest one without a name."""
    if name is not None and is_archive(Path(name)):
        with unpacked(Path(name)) as known:
            yield known
    else:
        yield find_experiment(name, experiments_folder)


def report_on(
    name: str | None,
    experiments_folder: Path | None,
    output: Path | None,
    say: Callable[[str], Any],
    read_test: bool = True,
) -> tuple[Findings, Path]:
    """Report on an experiment: running, finished, or moved here as a folder or an archive.

    Parameters
    ----------
    name
        An id, the beginning of one, a folder or an archive; the newest experiment by default.
    experiments_folder
        Where to look besides NNI's list.
    output, say, read_test
        As for :func:`nni_plugins.experiment.finish.finish`.
    """
    with located(name, experiments_folder) as known:
        return finish(known, output, say, read_test)


def compare_two(
    first: str, second: str, experiments_folder: Path | None = None, output: Path | None = None
) -> tuple[Comparison, Path]:
    """Compare two searches, or two single compressions; write ``compare.html``, ``.md``, ``.json``, ``.png``, ``.pdf``.

    Parameters
    ----------
    first, second
        Each an experiment as for :func:`report_on`, or the folder of a report.
    experiments_folder
        Where to look besides NNI's list.
    output
        Where to write; ``outputs/compare-A-B`` by default.

    Raises
    ------
    ExperimentError
        One that is not there, or two that measure different things.
    """
    from nni_plugins.experiment.finish import file_name
    from nni_plugins.report.compare import compare
    from nni_plugins.report.compare_page import save_comparison

    found = [findings_of(name, experiments_folder) for name in (first, second)]
    try:
        comparison = compare(*found)
    except ValueError as error:
        raise ExperimentError(f"{first} and {second} cannot be compared: {error}") from None
    folder = output or Path("outputs") / "-".join((COMPARE, *map(file_name, comparison.names)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_comparison(comparison, folder)
    except OSError as error:
        raise ExperimentError(f"{folder}: the comparison cannot be written ({error.strerror})") from None
    return comparison, folder


def findings_of(name: str, experiments_folder: Path | None = None) -> Findings:
    """What is known of an experiment, or what a report's folder (or its ``report.json``) says."""
    path = Path(name)
    file = path / DATA if path.is_dir() else path
    if file.name.endswith(".json") and file.is_file() and not (file.parent / "db" / "nni.sqlite").is_file():
        data = read_json(file)
        try:
            if data is None:
                raise ValueError
            return Findings.from_dict(data)
        except (TypeError, ValueError, KeyError, AttributeError, json.JSONDecodeError):
            raise ExperimentError(
                f"{file}: is not a report of nni-plugins; give an experiment or a report's folder"
            ) from None
    if path.is_dir() and not (path / "db" / "nni.sqlite").is_file() and (path / "report.md").is_file():
        raise ExperimentError(f"{path}: {DATA} is missing; the report was made without it, or it was not copied")
    with located(name, experiments_folder) as known:
        return look(known)
