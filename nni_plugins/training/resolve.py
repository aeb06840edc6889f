"""``module:function``: the user's own model, data, loss, metric or optimizer."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from nni_plugins.training.errors import RecipeError, where
from nni_plugins.training.schema import closest


def resolve(reference: str, folder: str | None, field: str) -> Any:
    """Import what a recipe names.

    Parameters
    ----------
    reference
        ``module:name``. The module is looked for in the recipe's folder, the working directory, and among what
        is installed, in this order.
    folder
        The recipe's folder.
    field
        Dotted path of the field, for the error.

    Raises
    ------
    RecipeError
        No such module (or it does not import), or no such name in it.
    """
    name, _, attribute = reference.partition(":")
    try:
        found: Any = _import(name, folder)
    except RecipeError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (error.name == name or name.startswith(error.name + ".")):
            looked = " and ".join(dict.fromkeys(str(place) for place in _places(folder)))
            raise RecipeError(
                f"{field} is {reference}: there is no module {error.name} in {looked} or installed"
            ) from None
        raise RecipeError(f"{field} is {reference}: its module fails to import: {error}") from error
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines() or [""]
        raise RecipeError(
            f"{field} is {reference}: its module fails to import: {type(error).__name__}: {reason[0]}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [item for item in vars(found) if not item.startswith("_")] if hasattr(found, "__dict__") else []
            raise RecipeError(f"{field} is {reference}: {name} has no {part}; {closest(part, known)}")
        found = getattr(found, part)
    return found


def call(reference: str, folder: str | None, field: str, *args: Any, **kwargs: Any) -> Any:
    """Resolve and call, with a wrong argument list reported as a mistake in the recipe."""
    import inspect

    function = resolve(reference, folder, field)
    if not callable(function):
        raise RecipeError(f"{field} is {reference}, which is not a function but {type(function).__name__}")
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise RecipeError(f"{field} is {reference}, which does not fit the arguments: {error}") from None
    except ValueError:
        pass  # no signature to read, as some built-ins
    try:
        return function(*args, **kwargs)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:  # the user's own function
        raise RecipeError(f"{field} is {reference}, which fails: {where(error)}") from error


def source_digest(reference: str, folder: str | None) -> str:
    """Return a hash of the module's file, so that an edited model is not taken for the old one."""
    name = reference.partition(":")[0]
    for place in _places(folder):
        path = _file_in(place, name)
        if path is not None:
            return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    if spec is None or not spec.origin or not os.path.isfile(spec.origin):
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _places(folder: str | None) -> list[Path]:
    return [Path(folder or os.getcwd()).absolute(), Path.cwd()]


def _file_in(place: Path, name: str) -> Path | None:
    path = place.joinpath(*name.split("."))
    for candidate in (path.with_name(path.name + ".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@contextmanager
def _searching(places: list[Path]) -> Iterator[None]:
    """Search these folders first while importing, and last afterwards (for imports inside functions)."""
    before = list(sys.path)
    sys.path[:0] = [str(place) for place in places]
    try:
        yield
    finally:
        sys.path[:] = before + [str(place) for place in places if str(place) not in before]


def _import(name: str, folder: str | None) -> ModuleType:
    places = _places(folder)
    file = next((found for place in places if (found := _file_in(place, name)) is not None), None)
    loaded = sys.modules.get(name)
    with _searching(places):
        if file is None or loaded is None:
            importlib.invalidate_caches()
            return importlib.import_module(name)
        if loaded.__file__ and Path(loaded.__file__).resolve() == file.resolve():
            return loaded
        # Another module has this name already: load ours beside it.
        alias = f"_recipe_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}_{name.replace('.', '_')}"
        if alias not in sys.modules:
            spec = importlib.util.spec_from_file_location(alias, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[alias] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[alias]
                raise
        return sys.modules[alias]
