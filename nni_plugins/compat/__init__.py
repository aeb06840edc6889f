"""NNI 3.0 on today's torch, Python and libraries.

Importing :mod:`nni_plugins` calls :func:`arm`. From then on, each patch of :mod:`nni_plugins.compat.defects` is
applied when the NNI module that it mends is imported, if the defect is found there; where upstream is fine,
nothing is changed. :func:`patches` tells what was done. Nothing here imports torch or NNI by itself.
"""

from __future__ import annotations

import sys

from nni_plugins.compat.defects import PATCHES
from nni_plugins.compat.hook import Patch, PatchFinder

__all__ = ["Patch", "arm", "patches"]

_finder = PatchFinder(PATCHES)


def arm() -> None:
    """Install the import hook that applies each patch when the NNI module it mends is imported.

    Modules that were imported before are patched at once. Calling it again does no harm.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.patch_imported()


def patches() -> tuple[Patch, ...]:
    """List the patches, each with its name, module, what it mends, and state.

    Returns
    -------
    tuple of Patch
        ``state`` is ``"applied"``, ``"not needed"`` (the module is imported, and has no such defect here),
        ``"waiting"`` (the module, or the framework that the defect lies in, has not been imported) or ``"failed"``
        (``detail`` says why).
    """
    return PATCHES
