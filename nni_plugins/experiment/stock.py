"""The winner through NNI's own stock ``ModelSpeedup`` with our replacers: another way to the same compact model."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from nni_plugins.report.findings import StockCheck

if TYPE_CHECKING:
    from nni_plugins.training import Recipe


def through_stock_speedup(recipe: Recipe, folder: Path) -> StockCheck:
    """Compact the trial's masked model with NNI's own code and compare it with ours.

    Parameters
    ----------
    recipe
        The trial's recipe, with the tuner's values in it.
    folder
        The trial's folder: ``masked.safetensors``, ``masks.safetensors`` and ``compact.safetensors``.

    Returns
    -------
    StockCheck
        Whether every parameter has our shape, and the largest difference of the outputs on random input.
    """
    if not (folder / "masked.safetensors").is_file():
        return StockCheck(False, float("nan"), "the recipe keeps no masked model (speedup.keep_masked)")
    with quiet():
        from nni.compression.speedup import ModelSpeedup

    from nni_plugins.speedup import REPLACERS
    from nni_plugins.speedup.verify import largest_error, outputs_of, random_like
    from nni_plugins.training.artefacts import load_masks, load_model
    from nni_plugins.training.data import build_data

    data = build_data(recipe)
    ours = load_model(recipe, data, folder / "compact.safetensors").eval()
    masked = load_model(recipe, data, folder / "masked.safetensors").eval()
    example = random_like(data.example)
    model, masks = copy.deepcopy(masked), load_masks(folder / "masks.safetensors")
    with quiet():
        speedup = ModelSpeedup(model, example, masks, customized_replacers=list(REPLACERS)) if masks else None
        theirs = model if speedup is None else speedup.speedup_model()  # NNI's fails where nothing is to be done
    theirs.eval()
    shapes = [{name: tuple(value.shape) for name, value in model.named_parameters()} for model in (ours, theirs)]
    _, error = largest_error(outputs_of(theirs, example), outputs_of(ours, example))
    return StockCheck(shapes[0] == shapes[1], error)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep NNI's several hundred lines on each layer, and its warnings, off the terminal."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)  # NNI's modules set levels of their own
        try:
            yield
        finally:
            logging.disable(before)
