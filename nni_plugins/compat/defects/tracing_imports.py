"""A module that is imported for the first time while NNI traces meets NNI's stand-ins for ``int``, ``type``, ….

Torch imports parts of itself, and a model its helpers, inside a forward. Their module bodies, and importlib itself
(``int.from_bytes``), need the real builtins: while a module is searched and executed, they are put back.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from nni_plugins.compat.defects.tiny_trace import trace_around
from nni_plugins.compat.hook import Patch

PROBE = "nni_plugins_probe_of_tracing_imports"


class _RealBuiltins:
    """The builtins as they were when tracing began, and how to have them back for a while."""

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self.real = dict(vars(builtins))

    @contextmanager
    def restored(self) -> Iterator[None]:
        namespace = vars(builtins)
        replaced = {name: namespace[name] for name, value in self.real.items() if namespace.get(name) is not value}
        if not replaced:
            yield
            return
        namespace.update({name: self.real[name] for name in replaced})
        try:
            with self.tracer.do_temp_disable(call=True, attr=True, agfunc_apply=True):
                yield
        finally:
            namespace.update(replaced)


class _Loader(Loader):
    def __init__(self, loader: Loader, outside: _RealBuiltins) -> None:
        self._loader = loader
        self._outside = outside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        with self._outside.restored():
            return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._outside.restored():
            self._loader.exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, outside: _RealBuiltins) -> None:
        self._outside = outside

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        with self._outside.restored():
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                if isinstance(finder, _Finder) or find is None:
                    continue
                spec = find(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self._outside)
                    return spec
        return None


class _ProbeLoader(Loader):
    """Loads an empty module, and notes which builtins are others than usual while it is executed."""

    def __init__(self) -> None:
        self.usual = dict(vars(builtins))
        self.replaced: list[str] | None = None

    def exec_module(self, module: ModuleType) -> None:
        namespace = vars(builtins)
        self.replaced = [name for name, value in self.usual.items() if namespace.get(name) is not value]


class _ProbeFinder(MetaPathFinder):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self._loader) if fullname == PROBE else None


def _defect(module: Any) -> bool:
    """Whether a module that is imported while NNI traces meets other builtins than usual."""
    loader = _ProbeLoader()
    finder = _ProbeFinder(loader)
    sys.meta_path.insert(0, finder)
    try:
        trace_around(module, lambda: importlib.import_module(PROBE))
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop(PROBE, None)
    if loader.replaced is None:
        raise RuntimeError("the tracer did not run the model")
    return bool(loader.replaced)


def _mend(module: Any) -> None:
    trace_graph = module.ConcreteTracer.trace

    @functools.wraps(trace_graph)
    def trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        finder = _Finder(_RealBuiltins(self))
        sys.meta_path.insert(0, finder)
        try:
            return trace_graph(self, *args, **kwargs)
        finally:
            sys.meta_path.remove(finder)

    module.ConcreteTracer.trace = trace


PATCH = Patch(
    name="tracing-imports",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace fails where a forward is the first to import a module ('clz_wrapper_clz' object has no "
    "attribute 'from_bytes')",
    defect=_defect,
    mend=_mend,
)
