"""Take what is masked out of a model, prove that nothing changed, save it and load it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nni_plugins.speedup.checked_file import CompactFileError
    from nni_plugins.speedup.mask_updaters import MASK_UPDATERS
    from nni_plugins.speedup.model_speedup import ModelSpeedup
    from nni_plugins.speedup.optimizer import fit_optimizer
    from nni_plugins.speedup.origins import masks_of_torch_prune, masks_of_zeros
    from nni_plugins.speedup.replacers import REPLACERS
    from nni_plugins.speedup.report import SpeedupReport
    from nni_plugins.speedup.sparse import load_sparse, save_sparse, sparse_bytes
    from nni_plugins.speedup.storage import load_compact, save_compact

__all__ = [
    "MASK_UPDATERS",
    "REPLACERS",
    "CompactFileError",
    "ModelSpeedup",
    "SpeedupReport",
    "fit_optimizer",
    "load_compact",
    "load_sparse",
    "masks_of_torch_prune",
    "masks_of_zeros",
    "save_compact",
    "save_sparse",
    "sparse_bytes",
]

_HOMES = {
    "ModelSpeedup": "model_speedup",
    "SpeedupReport": "report",
    "CompactFileError": "checked_file",
    "fit_optimizer": "optimizer",
    "load_compact": "storage",
    "save_compact": "storage",
    "load_sparse": "sparse",
    "save_sparse": "sparse",
    "sparse_bytes": "sparse",
    "masks_of_torch_prune": "origins",
    "masks_of_zeros": "origins",
    "MASK_UPDATERS": "mask_updaters",
    "REPLACERS": "replacers",
}


def __getattr__(name: str) -> Any:
    """Import on first use: loading a compact model must not need NNI."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return list(value) if name in ("REPLACERS", "MASK_UPDATERS") else value  # NNI appends to the list it is given
