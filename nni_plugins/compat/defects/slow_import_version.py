"""``nni.common.version`` imports whole frameworks to read their version numbers; the metadata have them too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from nni_plugins.compat.hook import Patch
from nni_plugins.compat.lazy import LazyModule, installed_version, stand_in, worth_deferring


def _prepare(module: ModuleType) -> Callable[[], None] | None:
    stand_ins = [
        LazyModule(name, module, {"__version__": version})
        for name in ("pytorch_lightning", "tensorflow")
        if worth_deferring(name) and (version := installed_version(name)) is not None
    ]
    return stand_in(module, *stand_ins) if stand_ins else None


PATCH = Patch(
    name="slow-import-version",
    module="nni.common.version",
    mends="importing nni.compression imports pytorch_lightning and tensorflow to read their version numbers",
    prepare=_prepare,
)
