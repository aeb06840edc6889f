"""``torch.load`` refuses, since torch 2.6, the mask files that NNI's own documentation writes.

``torch.save(masks, 'masks.pth')`` holds a ``defaultdict``, which is not on the list of what ``weights_only`` loads.
The file is still read with ``weights_only``, and a plain dictionary takes its place, so a foreign file runs no code.
NumPy arrays of numbers are let through as well.
"""

from __future__ import annotations

import functools
import io
import types
import warnings
from collections import defaultdict
from typing import Any

from nni_plugins.compat.hook import Patch


def _plain_dict(factory: Any = None) -> dict[Any, Any]:
    """Stand in for ``defaultdict``: torch fills no other kind of dictionary from a file that it does not trust."""
    return {}


# torch looks a function up by its module and name.
_plain_dict.__module__, _plain_dict.__name__, _plain_dict.__qualname__ = "collections", "defaultdict", "defaultdict"


def _reconstructed(kind: Any, shape: Any, code: Any) -> Any:
    """Stand in for what NumPy makes an empty array by, whatever NumPy wrote the file: it is filled afterwards."""
    import numpy as np

    return np.ndarray(0, dtype="b")


def _array_parts() -> list[Any]:
    """What a file of NumPy arrays is made of: the arrays, their kinds of numbers, and bytes."""
    import _codecs

    import numpy as np

    makers = []
    for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
        maker = types.FunctionType(_reconstructed.__code__, _reconstructed.__globals__, "_reconstruct")
        maker.__module__, maker.__qualname__ = home, "_reconstruct"
        makers.append(maker)
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [*makers, np.ndarray, np.dtype, *kinds, _codecs.encode]


def load_masks(file: Any, map_location: Any = None) -> Any:
    """Read a file of masks as NNI's pruners return them.

    Parameters
    ----------
    file
        Path or open binary file, written by ``torch.save(masks, file)``.
    map_location
        As of ``torch.load``; by default, what was saved on a GPU comes to the CPU where there is no GPU.

    Returns
    -------
    dict
        ``{module name: {target name: mask}}``.
    """
    import torch

    if map_location is None and not torch.cuda.is_available():
        map_location = "cpu"
    allowed: list[Any] = [_plain_dict, dict, *_array_parts()]
    if not hasattr(torch.serialization, "safe_globals"):  # torch 2.4
        before = torch.serialization.get_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location=map_location, weights_only=True)


def _refused(module: Any) -> bool:
    torch = module.torch
    file = io.BytesIO()
    torch.save(defaultdict(dict, {"layer": {"weight": torch.ones(1)}}), file)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file)
    except Exception:
        return True
    return False


def _is_file(masks: Any) -> bool:
    from pathlib import Path

    return isinstance(masks, (str, Path)) and Path(masks).is_file()


def _speedup_defect(module: Any) -> bool:
    return not hasattr(module.ModelSpeedup.__init__, "__nni_plugins__") and _refused(module)


def _mend_speedup(module: Any) -> None:
    construct = module.ModelSpeedup.__init__

    @functools.wraps(construct)
    def __init__(
        self: Any, model: Any, dummy_input: Any, masks_or_file: Any, map_location: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if _is_file(masks_or_file):
            masks_or_file = load_masks(masks_or_file, map_location)
        construct(self, model, dummy_input, masks_or_file, map_location, *args, **kwargs)

    __init__.__nni_plugins__ = True  # type: ignore[attr-defined]
    module.ModelSpeedup.__init__ = __init__


def _conflict_defect(module: Any) -> bool:
    return not hasattr(module.fix_mask_conflict, "__nni_plugins__") and _refused(module)


def _mend_conflict(module: Any) -> None:
    fix = module.fix_mask_conflict

    @functools.wraps(fix)
    def fix_mask_conflict(masks: Any, *args: Any, **kwargs: Any) -> Any:
        return fix(load_masks(masks) if _is_file(masks) else masks, *args, **kwargs)

    fix_mask_conflict.__nni_plugins__ = True  # type: ignore[attr-defined]
    module.fix_mask_conflict = fix_mask_conflict


SPEEDUP = Patch(
    name="mask-file-speedup",
    module="nni.compression.speedup.model_speedup",
    mends="ModelSpeedup(model, x, 'masks.pth') fails with 'Weights only load failed'",
    defect=_speedup_defect,
    mend=_mend_speedup,
)
CONFLICT = Patch(
    name="mask-file-conflict",
    module="nni.compression.utils.mask_conflict",
    mends="fix_mask_conflict('masks.pth', …) fails with 'Weights only load failed'",
    defect=_conflict_defect,
    mend=_mend_conflict,
)
