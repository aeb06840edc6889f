"""Apply each patch when the NNI module that it mends is imported.

A :class:`Patch` names one defect of one module: how to detect it, and how to mend it. :func:`arm` puts a finder
in front of ``sys.meta_path``; it lets the usual finders locate the module, and runs the patches around the
module's execution. A module that was imported before is patched at once. A defect that lies between NNI and a
framework which NNI may never import is judged once both are there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any, Literal

State = Literal["waiting", "applied", "not needed", "failed"]


def _nothing(module: ModuleType) -> None:
    """Mend nothing."""


def _ready(name: str) -> bool:
    """Whether the module is imported, to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _installed(name: str) -> bool:
    package = name.partition(".")[0]
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@dataclass
class Patch:
    """One defect of one module, and its remedy.

    Parameters
    ----------
    name
        Short, unique, with hyphens: ``"node-is-impure"``.
    module
        The module that is mended; nothing happens before it is imported.
    mends
        One line for the user: what fails without the patch.
    defect
        Whether the executed module has the defect, here and now. Never a comparison of version numbers where
        the behaviour itself can be probed. False after `mend` has run, which makes the patch idempotent.
    mend
        Mends the executed module in place.
    prepare
        Optional, runs before the module is executed, for what cannot be mended afterwards (an import that
        costs seconds). It returns a function that is called right after the execution, or None where there is
        nothing to do. A module that was imported before us is left as it is.
    framework
        Optional, a module of another package, without which neither the defect can be seen nor the mended code
        be used: ``"transformers.trainer"``. The patch waits until it is imported, and never imports it.
    """

    name: str
    module: str
    mends: str
    defect: Callable[[ModuleType], bool] = field(default=lambda module: False, repr=False)
    mend: Callable[[ModuleType], None] = field(default=_nothing, repr=False)
    prepare: Callable[[ModuleType], Callable[[], None] | None] | None = field(default=None, repr=False)
    framework: str = field(default="", repr=False)
    state: State = "waiting"
    detail: str = ""

    def before(self, module: ModuleType) -> Callable[[], None] | None:
        """Run `prepare`; its failure is recorded and never reaches the import."""
        if self.prepare is None:
            return None
        try:
            undo = self.prepare(module)
        except Exception as error:
            self._fail(error)
            return None
        self.state, self.detail = ("applied", "") if undo is not None else ("not needed", "")
        return undo

    def after(self, module: ModuleType, framework_ready: bool = False) -> None:
        """Probe the executed module, and mend it where the defect is there; or put it off until the framework is."""
        if self.prepare is not None:
            if self.state == "waiting":
                self.state, self.detail = "not needed", f"{self.module} was imported before nni_plugins"
            return
        if self.framework and not framework_ready and not _ready(self.framework):
            if self.state == "applied":
                return
            if _installed(self.framework):
                self.state, self.detail = "waiting", "it is looked at when that is imported"
            else:
                self.state, self.detail = "not needed", f"{self.framework.partition('.')[0]} is not installed"
            return
        try:
            if self.defect(module):
                self.mend(module)
                self.state, self.detail = "applied", ""
            elif self.state != "applied":
                self.state, self.detail = "not needed", ""
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.state, self.detail = "failed", f"{type(error).__name__}: {error}"
        warnings.warn(
            f"nni_plugins.compat: patch {self.name} of {self.module} failed ({self.detail}); "
            "NNI runs without it: see `nni-plugins doctor`",
            RuntimeWarning,
            stacklevel=2,
        )


class _PatchingLoader(Loader):
    """The module's own loader, with the patches run around the execution.

    `patches` are those of the module, `waiting` those of other modules that want this one as their framework.
    """

    def __init__(self, loader: Loader, patches: Sequence[Patch], waiting: Sequence[Patch]) -> None:
        self._loader = loader
        self._patches = patches
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on nobody needs to know that we were there: pickling, inspect and reload see the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        undos = [undo for patch in self._patches if (undo := patch.before(module)) is not None]
        try:
            self._loader.exec_module(module)
        finally:
            for undo in reversed(undos):
                undo()
        for patch in self._patches:
            patch.after(module)
        for patch in self._waiting:
            if _ready(patch.module):
                patch.after(sys.modules[patch.module], framework_ready=True)


class PatchFinder(MetaPathFinder):
    """Finds the modules that have patches, through the finders behind it."""

    def __init__(self, patches: Iterable[Patch]) -> None:
        self.patches: dict[str, list[Patch]] = {}
        self.frameworks: dict[str, list[Patch]] = {}
        for patch in patches:
            self.patches.setdefault(patch.module, []).append(patch)
            if patch.framework:
                self.frameworks.setdefault(patch.framework, []).append(patch)
        self._busy = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patches, waiting = self.patches.get(fullname, ()), self.frameworks.get(fullname, ())
        if not (patches or waiting) or fullname in getattr(self._busy, "names", ()):
            return None
        self._busy.names = {*getattr(self._busy, "names", ()), fullname}
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                if finder is self or find is None:
                    continue
                spec = find(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _PatchingLoader(spec.loader, patches, waiting)
                    return spec
        finally:
            self._busy.names = self._busy.names - {fullname}
        return None

    def patch_imported(self) -> None:
        """Patch the modules that are there already, but for those still being executed."""
        for name, patches in self.patches.items():
            if not _ready(name):
                continue
            for patch in patches:
                if patch.state == "waiting":
                    patch.after(sys.modules[name])
