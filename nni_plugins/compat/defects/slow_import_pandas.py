"""``import nni`` imports json_tricks, which imports pandas to know whether it is there.

json_tricks then asks of every object that JSON does not know whether it is a data frame. No object can be one
before pandas has been imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from nni_plugins.compat.hook import Patch
from nni_plugins.compat.lazy import LazyModule, stand_in, worth_deferring


def _prepare(module: Any) -> Callable[[], None] | None:
    if not worth_deferring("pandas"):
        return None
    remove = stand_in(module, LazyModule("pandas", module))

    def undo() -> None:
        remove()
        encoders = module.DEFAULT_ENCODERS
        encode = module.pandas_encode

        @functools.wraps(encode)
        def pandas_encode(obj: Any, primitives: bool = False) -> Any:
            return encode(obj, primitives=primitives) if "pandas" in sys.modules else obj

        encoders[:] = [pandas_encode if encoder is encode else encoder for encoder in encoders]

    return undo


PATCH = Patch(
    name="slow-import-pandas",
    module="json_tricks.nonp",
    mends="`import nni` takes half a second more than it need, for pandas",
    prepare=_prepare,
)
