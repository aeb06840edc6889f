"""Stand-ins for modules that NNI imports early and uses rarely.

While an NNI module is executed, its own ``import pytorch_lightning as pl`` is answered with a :class:`LazyModule`;
the import statements of all other modules, those that it imports included, work as ever. The NNI module keeps the
stand-in under its own name, and the first attribute that is asked of it imports the real module and puts it in place.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def worth_deferring(name: str) -> bool:
    """Whether the module can be imported and has not been yet."""
    if name in sys.modules:
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


class LazyModule(ModuleType):
    """Looks like the module `name`; imports it when one of its attributes is asked for.

    Parameters
    ----------
    name
        Full name of the module.
    owner
        Module whose globals hold this stand-in, and in which the real module takes its place.
    known
        Attributes that are known without importing.
    """

    def __init__(self, name: str, owner: ModuleType, known: dict[str, Any] | None = None) -> None:
        super().__init__(name)
        self.__dict__.update(known or {})
        self.__dict__["_owner"] = owner

    def __getattr__(self, attribute: str) -> Any:
        real = importlib.import_module(self.__name__)
        for key, value in list(vars(self._owner).items()):
            if value is self:
                setattr(self._owner, key, real)
        return getattr(real, attribute)


class LazyCallable:
    """Looks like the object `attribute` of the module `name`; fetched when it is called or looked into."""

    def __init__(self, name: str, attribute: str) -> None:
        self._place = (name, attribute)

    def _real(self) -> Any:
        name, attribute = self._place
        return getattr(importlib.import_module(name), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._real(), attribute)


def stand_in(owner: ModuleType, *modules: ModuleType) -> Callable[[], None]:
    """Answer the import statements of `owner` with the stand-ins, until the returned function is called."""
    names = {module.__name__: module for module in modules}
    usual = builtins.__import__

    def __import__(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in names and args and args[0] is owner.__dict__:
            return names[name]
        return usual(name, *args, **kwargs)

    builtins.__import__ = __import__

    def undo() -> None:
        if builtins.__import__ is __import__:
            builtins.__import__ = usual

    return undo


def installed_version(name: str) -> str | None:
    """Version of the distribution `name`, read from its metadata; None where there is none of that name."""
    import importlib.metadata  # 20 ms that `nni-plugins --help` need not pay

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
