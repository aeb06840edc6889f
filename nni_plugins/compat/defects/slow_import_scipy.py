"""``import nni`` imports scipy.stats for four distributions, which only ``nni.mutable.Numerical`` calls."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from nni_plugins.compat.hook import Patch
from nni_plugins.compat.lazy import LazyCallable, stand_in, worth_deferring

DISTRIBUTIONS = ("norm", "lognorm", "uniform", "loguniform")


def _prepare(module: ModuleType) -> Callable[[], None] | None:
    if not worth_deferring("scipy.stats"):
        return None
    stats = ModuleType("scipy.stats")
    stats.__dict__.update({name: LazyCallable("scipy.stats", name) for name in DISTRIBUTIONS})
    return stand_in(module, stats)


PATCH = Patch(
    name="slow-import-scipy",
    module="nni.mutable.mutable",
    mends="`import nni` takes half a second more than it need, for scipy.stats",
    prepare=_prepare,
)
