"""NNI wraps every class that ``torch.nn`` exports, and warns of each that is no module: newer torch has two."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

from nni_plugins.compat.hook import Patch

NOISE = "is found to be not a nn.Module"


def _prepare(module: ModuleType) -> Callable[[], None]:
    quiet = warnings.catch_warnings()
    quiet.__enter__()
    warnings.filterwarnings("ignore", message=f".*{NOISE}", category=RuntimeWarning)

    def undo() -> None:
        quiet.__exit__(None, None, None)

    return undo


PATCH = Patch(
    name="nas-layers",
    module="nni.nas.nn.pytorch.layers",
    mends="importing nni.nas.nn.pytorch warns that torch may be too new, for classes in torch.nn that are no modules",
    prepare=_prepare,
)
