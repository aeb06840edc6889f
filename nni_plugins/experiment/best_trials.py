"""The end of a quick search: the best trials, which were pruned but not fine-tuned, go the whole way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from nni_plugins.experiment.folders import METRICS, read_json
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.trials import Trial, ranked
from nni_plugins.training.errors import CompressionError

FINETUNED = "finetuned"
"""The folder, in the experiment's own, that holds what the fine-tuned trials left."""


def finetune_best(known: Known, trials: Sequence[Trial], say: Callable[[str], Any]) -> list[Trial]:
    """Fine-tune the best trials of a search whose recipe says ``search.mode: quick``.

    Parameters
    ----------
    known
        The experiment. What is made lies in its folder, below ``finetuned``, and is not made again.
    trials
        All its trials.
    say
        Called with one line for each.

    Returns
    -------
    list of Trial
        All trials; the fine-tuned ones have the metrics and the folder of what they became.

    Raises
    ------
    CompressionError
        None of them could be fine-tuned; with the first one's reason.
    """
    from nni_plugins.training import compress, load_recipe, prepare_dense

    order = ranked(trials)
    if not order or order[0].folder is None:
        return list(trials)
    wanted = load_recipe(order[0].folder / "recipe.yml").search.finetune_best
    made: dict[str, Trial] = {}
    reasons = []
    for number, trial in enumerate(order[:wanted], 1):
        assert trial.folder is not None
        recipe = load_recipe(trial.folder / "recipe.yml").with_values({"search.mode": "full"})
        folder = known.folder / FINETUNED / trial.id
        metrics = read_json(folder / METRICS)
        if metrics is None or load_recipe(folder / "recipe.yml") != recipe:
            say(f"fine-tuning trial {trial.id}, {number} of the {min(wanted, len(order))} best")
            try:
                metrics = compress(recipe, folder, prepare_dense(recipe, known.folder / "dense", say))
            except CompressionError as error:
                say(f"trial {trial.id} is left out: {error}")
                reasons.append(str(error))
                continue
        made[trial.id] = dataclasses.replace(trial, metrics=metrics, folder=folder)
    if not made:
        raise CompressionError(f"none of the {len(reasons)} best trials could be fine-tuned: {reasons[0]}")
    return [made.get(trial.id, trial) for trial in trials]
