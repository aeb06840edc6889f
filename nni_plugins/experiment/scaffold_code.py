"""Where the user's own code is, as a recipe names it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from nni_plugins.experiment.errors import ExperimentError


def reference_of(text: str, what: str) -> tuple[str, Path | None]:
    """``module:function``, and the folder where a recipe finds it; None where it is installed."""
    place, colon, attribute = text.rpartition(":")
    if not colon or not place or not attribute:
        raise ExperimentError(f"{what} {text}: write module:function or path/to/file.py:function")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise ExperimentError(f"{what} {text}: there is no file {path}")
        if not path.stem.isidentifier():
            raise ExperimentError(f"{what} {text}: {path.name} cannot be imported; name it by letters, digits and _")
        return f"{path.stem}:{attribute}", path.absolute().parent
    if not all(part.isidentifier() for part in place.split(".")):
        raise ExperimentError(f"{what} {text}: {place} is no module; write module:function or path/to/file.py:function")
    if file_of(Path.cwd(), text).exists():
        return text, Path.cwd()
    if importlib.util.find_spec(place.partition(".")[0]) is None:
        raise ExperimentError(f"{what} {text}: there is no module {place} in {Path.cwd()} or installed")
    return text, None


def file_of(folder: Path, reference: str) -> Path:
    """The file of the module that a reference names, in the folder where it is looked for."""
    path = folder.joinpath(*reference.partition(":")[0].split("."))
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_name(f"{path.name}.py")


def bring(folder: Path, reference: str, to: Path) -> None:
    """Copy the module that a reference names, or the package that it is in, to another folder."""
    top = folder / reference.partition(":")[0].partition(".")[0]
    if top.is_dir():
        shutil.copytree(top, to / top.name, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
    else:
        shutil.copyfile(top.with_name(f"{top.name}.py"), to / f"{top.name}.py")


def dotted(reference: str, folder: Path, common: Path) -> str:
    """A reference as it is seen from a folder above its own."""
    return ".".join([*folder.relative_to(common).parts, reference])
