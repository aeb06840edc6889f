"""The end of a search: choose the winner, read the test split once, prove, and write the report and the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nni_plugins.experiment.best_trials import FINETUNED, finetune_best
from nni_plugins.experiment.bring import bring_missing
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.evaluate import evaluated, noted, recorded
from nni_plugins.experiment.folders import METRICS, read_json
from nni_plugins.experiment.gather import best_of, gather, is_ours, metrics_of
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.recipe_watch import said_of_recipes
from nni_plugins.experiment.trials import Trial, ranked
from nni_plugins.experiment.write import HTML, write
from nni_plugins.report.findings import Findings
from nni_plugins.report.importance import importances


def finish(
    known: Known, output: Path | None, say: Callable[[str], Any], read_test: bool = True
) -> tuple[Findings, Path]:
    """Report on the trials that an experiment has.

    Parameters
    ----------
    known
        The experiment: running, stopped, or moved here from elsewhere. While it runs, and where it came out of an
        archive, no model of it is run, and the test split stays unread.
    output
        Where the report goes; ``outputs/NAME-ID`` by default.
    say
        Called with a line on each step that takes time.
    read_test
        Whether the test split may be read, which is for the end of a search.

    Returns
    -------
    The findings, and the folder that they were written to.

    Raises
    ------
    ExperimentError
        When no trial succeeded, with the first failed trial's reason.
    """
    running = known.running()
    trials = bring_missing(known, known.trials(), say) if known.listed else known.trials()
    if not trials:
        raise ExperimentError(no_winner(known, trials))
    at_rest = not running and not known.archive
    if at_rest and any(_quick(trial) for trial in ranked(trials)[:1]):
        trials = finetune_best(known, trials, say)
    elif known.archive:
        trials = finetuned_trials(known, trials)
    findings = gather(known, trials, known.curves(), running)
    if changed := said_of_recipes(known.folder):
        findings = noted(findings, changed)
    winner = best_of(trials, findings.maximize)
    source = winner.folder if winner is not None and findings.compact is not None else None
    source = source if source is not None and (source / METRICS).is_file() else None
    if winner is not None and source is not None:
        read = evaluated if at_rest else recorded
        findings = read(findings, known, winner, say, read_test)
    elif findings.compact is not None:
        findings = noted(findings, f"the files of trial {findings.chosen} are not on this machine: no model is copied")
    if winner is not None and (gone := better_without_files(trials, winner)):
        findings = noted(findings, gone)
    findings = replace(findings, importance=importances(findings))
    written = write(findings, output or Path("outputs") / f"{file_name(findings.title)}-{known.id}", source)
    if winner is None and not running:
        raise ExperimentError(f"{no_winner(known, trials)}; {written / HTML} shows all trials")
    return findings, written


def better_without_files(trials: Sequence[Trial], winner: Trial) -> str:
    """One line on a trial that did better than the winner, and whose files somebody removed; empty without one."""
    tuned = winner.folder is not None and winner.folder.parent.name == FINETUNED
    if tuned or winner.default is None or not is_ours(metrics_of(winner)):
        return ""
    counted = [trial for trial in trials if trial.status == "SUCCEEDED" and trial.default is not None]
    first = max(counted, key=lambda trial: trial.default or 0.0, default=winner)
    if (first.default or 0.0) <= winner.default or (first.folder is not None and (first.folder / METRICS).is_file()):
        return ""
    return (
        f"trial {first.id} was better (default {first.default:.4f}), and its files are not here any more: "
        f"this report is on {winner.id}"
    )


def _quick(trial: Trial) -> bool:
    from nni_plugins.training import load_recipe
    from nni_plugins.training.errors import RecipeError

    if trial.folder is None or not is_ours(metrics_of(trial)):
        return False
    try:
        return load_recipe(trial.folder / "recipe.yml").search.mode == "quick"
    except RecipeError:  # of another version, or there is none: said where the winner's is read
        return False


def look(known: Known) -> Findings:
    """What is known of an experiment without running, testing or writing anything.

    Raises
    ------
    ExperimentError
        When it has no trials.
    """
    running = known.running()
    trials = known.trials()
    if not trials:
        raise ExperimentError(no_winner(known, trials))
    trials = finetuned_trials(known, trials)
    findings = gather(known, trials, known.curves(), running)
    if changed := said_of_recipes(known.folder):
        findings = noted(findings, changed)
    winner = best_of(trials, findings.maximize)
    if winner is None or winner.folder is None or findings.compact is None:
        return findings
    return recorded(findings, known, winner, lambda line: None, False)


def finetuned_trials(known: Known, trials: list[Trial]) -> list[Trial]:
    """The trials; those that an earlier report fine-tuned as they were then."""
    found = []
    for trial in trials:
        folder = known.folder / FINETUNED / trial.id
        metrics = read_json(folder / METRICS)
        found.append(trial if metrics is None else replace(trial, folder=folder, metrics=metrics))
    return found


def file_name(title: str) -> str:
    """An experiment's name as part of a folder's: it may hold anything."""
    return re.sub(r"[^\w.+-]+", "_", title).strip("._")[:80] or "experiment"


def no_winner(known: Known, trials: list[Trial]) -> str:
    """Why there is nothing to report, in one line."""
    if not trials:
        return f"experiment {known.id} has no trials yet; `nni-plugins status {known.id}` shows how far it is"
    failed = [trial for trial in trials if trial.status == "FAILED"]
    if failed:
        return (
            f"experiment {known.id}: no trial succeeded, {len(failed)} of {len(trials)} failed; "
            f"trial {failed[0].id}: {failed[0].reason}"
        )
    return f"experiment {known.id}: none of its {len(trials)} trials has left a compact model on this machine"
