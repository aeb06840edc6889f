"""An experiment's folder in one file, ``.tar.gz`` or ``.zip``: unpacked for a report, and trusted with nothing.

Only the files that a report reads are taken out, by name. A member that would land outside refuses the whole archive;
links and devices are left behind.
"""

from __future__ import annotations

import re
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.evaluate import RECORD, TEST
from nni_plugins.experiment.folders import FAILURE
from nni_plugins.experiment.manifest import Known, moved
from nni_plugins.experiment.write import KEPT
from nni_plugins.report.environment import ENVIRONMENT

ENDINGS = (".tar.gz", ".tgz", ".tar", ".tar.xz", ".tar.bz2", ".zip")
DATABASE = "nni.sqlite"
WANTED = frozenset((DATABASE, RECORD, TEST, FAILURE, ENVIRONMENT, "trial.stderr", "stderr", *KEPT))
MOST_BYTES = 8 * 1024**3
MOST_FILES = 200_000


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive, and a file is there."""
    return path.name.lower().endswith(ENDINGS) and path.is_file()


@contextmanager
def unpacked(path: Path) -> Iterator[Known]:
    """The experiment in an archive, in a folder that is there for the time of the block.

    Parameters
    ----------
    path
        The archive: of the experiment's folder, or of one that holds it.

    Raises
    ------
    ExperimentError
        An archive that cannot be read, that would write elsewhere, or that does not hold one experiment of NNI's.
    """
    with tempfile.TemporaryDirectory(prefix="nni-plugins-") as scratch:
        folder = Path(scratch).resolve()
        try:
            (_unzip if path.name.lower().endswith(".zip") else _untar)(path, folder)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise ExperimentError(f"{path}: the archive cannot be read ({words})") from None
        found = sorted(one.parent.parent for one in folder.rglob(DATABASE) if one.parent.name == "db")
        if not found:
            raise ExperimentError(f"{path}: no experiment of NNI's is in this archive (db/{DATABASE} is missing)")
        if len(found) > 1:
            names = ", ".join(one.name for one in found[:8])
            raise ExperimentError(
                f"{path}: {len(found)} experiments are in this archive ({names}); unpack it, name one"
            )
        yield moved(found[0], archive=True)


def _untar(path: Path, folder: Path) -> None:
    budget = _Budget(path)
    with tarfile.open(path) as archive:
        for member in archive:
            target = _target(path, member.name, folder)
            if member.isfile() and target.name in WANTED:
                source = archive.extractfile(member)
                if source is not None:
                    budget.copy(source, target)


def _unzip(path: Path, folder: Path) -> None:
    budget = _Budget(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            target = _target(path, member.filename, folder)
            link = stat.S_ISLNK(member.external_attr >> 16)
            if not member.is_dir() and not link and target.name in WANTED:
                with archive.open(member) as source:
                    budget.copy(source, target)


def _target(path: Path, name: str, folder: Path) -> Path:
    """Where a member goes, which must be inside."""
    parts = PurePosixPath(name.replace("\\", "/"))
    target = folder.joinpath(*(part for part in parts.parts if part != "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match("[A-Za-z]:", name) or not target.is_relative_to(folder):
        raise ExperimentError(f"{path}: refused: {name!r} in it would be written outside of its folder")
    return target


class _Budget:
    """Counts what is unpacked: a small archive can hold more than a disk does."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.files = path, 0, 0

    def copy(self, source: IO[bytes], target: Path) -> None:
        self.files += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            while chunk := source.read(1 << 20):
                self.bytes += len(chunk)
                if self.bytes > MOST_BYTES or self.files > MOST_FILES:
                    raise ExperimentError(
                        f"{self.path}: refused: it holds more than {MOST_BYTES >> 30} GiB for a report"
                    )
                file.write(chunk)
