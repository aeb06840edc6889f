"""The process that NNI starts for one trial: the recipe with the tuner's values in it, made into a compact model.

    python -m nni_plugins.trial recipe.yml
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m nni_plugins.trial recipe.yml

The second trains in two processes, each on its part of every batch; the first of them speaks to NNI.

The names in a search space are fields of the recipe by dotted path (``prune.sparsity``, ``finetune.learning_rate``), so
that a trial is ``recipe.with_values(nni.get_next_parameter())``. What it makes stays in its output folder, see
:mod:`nni_plugins.experiment.folders`. Outside NNI the recipe runs as it stands, into ``outputs/trial``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nni_plugins.experiment.folders import FAILURE, dense_folder, told_to_nni, trial_output, write_failure
from nni_plugins.experiment.guard import die_with_manager, only_writer
from nni_plugins.report.environment import save_environment

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one trial; 0 when it reported its final result, 1 when it could not, with the reason in its folder."""
    parser = argparse.ArgumentParser(prog="python -m nni_plugins.trial", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, help="recipe.yml, relative to the experiment's trialCodeDirectory")
    options = parser.parse_args(arguments)

    def work(output: Path, parameters: dict[str, Any]) -> None:
        import nni

        from nni_plugins.pruners.ranks import as_on_rank_zero
        from nni_plugins.training.processes import joined

        with joined() as rank:
            if rank == 0:
                parameters.update(nni.get_next_parameter() or {})
            parameters.update(as_on_rank_zero(parameters))
            logger.info("parameters: %s", parameters)
            metrics = run(options.recipe, parameters, output, nni.report_intermediate_result if rank == 0 else None)
            if rank == 0:
                nni.report_final_result(told_to_nni(metrics))

    return as_trial(work)


def as_trial(work: Callable[[Path, dict[str, Any]], None]) -> int:
    """Do the work of a trial as its folder's only writer; it ends with its manager, and leaves its reason if it fails.

    Parameters
    ----------
    work
        Called with the output folder, and with a dictionary that it fills with the trial's parameters.

    Returns
    -------
    int
        The exit status.
    """
    die_with_manager()
    output = trial_output()
    parameters: dict[str, Any] = {}
    try:
        if os.environ.get("RANK", "0") != "0":  # a further process of the trial, as torchrun starts them
            with tempfile.TemporaryDirectory(prefix="nni-plugins-") as scratch:
                work(Path(scratch), parameters)
            return 0
        with only_writer(output):
            (output / FAILURE).unlink(missing_ok=True)
            work(output, parameters)
            save_environment(output)
    except Exception as error:
        if _said_by_another(error, output):
            return 1
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = type(error).__name__ in EXPECTED
        logger.error("this trial cannot work: %s", reason, exc_info=not expected)
        write_failure(output, reason if expected else f"{type(error).__name__}: {reason}", error, parameters)
        print(reason, file=sys.stderr)
        return 1
    return 0


def _said_by_another(error: Exception, output: Path) -> bool:
    """Wait for the reason of the process that failed first, where this one only lost its connection to it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from nni_plugins.training.processes import lost_another

    deadline = time.monotonic() + 5
    while lost_another(error) and time.monotonic() < deadline:
        if (output / FAILURE).exists():
            return True
        time.sleep(0.1)
    return False


EXPECTED = {"CompressionError", "RecipeError", "TimeoutError"}
"""The errors whose text says all; any other one leaves its traceback in the trial's log too."""


def run(recipe_path: Path, parameters: dict[str, Any], output: Path, on_epoch: Any) -> dict[str, Any]:
    """Compress by the recipe with `parameters` in it; returns the metrics, ``default`` first."""
    from nni_plugins.training import load_recipe
    from nni_plugins.training.dense import prepare_dense
    from nni_plugins.training.pipeline import compress

    recipe = load_recipe(recipe_path).with_values(parameters)
    dense = prepare_dense(recipe, dense_folder(output), logger.info)
    return compress(recipe, output, dense, on_epoch)


if __name__ == "__main__":
    sys.exit(main())
