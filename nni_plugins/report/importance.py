"""Which parameters of a search decide its results: functional ANOVA over the trials, or why that cannot be said.

Every search has some parameter that comes first; whether that means something is another question. So the shares are
means over resampled trials, with their spread, and they are given only where a forest of the same kind predicts trials
that it has not seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nni_plugins.report.findings import Candidate, Findings, Importance

LEAST_TRIALS = 12
TRIALS_PER_PARAMETER = 2
LEAST_EXPLAINED = 0.1
"""Below this cross-validated R², what the parameters say of a trial is hardly more than noise."""
RESAMPLES, TREES, FOLDS = 6, 8, 5
MOST_TRIALS = 200
"""Of longer searches so many trials are used, drawn by a fixed seed."""


def flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a trial without nesting: a nested choice as its ``_name`` and the fields beside it."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and "_name" in value:
            found[str(name)] = value["_name"]
            found.update(flat({key: item for key, item in value.items() if key != "_name"}))
        else:
            found[str(name)] = value
    return found


def importances(findings: Findings) -> list[Importance]:
    """What decides the metric, the MACs where the trials know them, and what else the tuner was told to optimise."""
    trials = [one for one in findings.candidates if one.metric is not None]
    if any(one.finetuned for one in trials):
        trials = [one for one in trials if one.finetuned]
    named = [str(one.get("name")) for one in findings.search.get("objectives") or () if isinstance(one, Mapping)]
    objectives = [findings.metric if name == "accuracy" else name for name in named]
    found = []
    for target in dict.fromkeys([findings.metric, "macs", *objectives]):
        results = {one.id: _figure(one, target, findings.metric) for one in trials}
        if target == findings.metric or any(value is not None for value in results.values()):
            found.append(importance_of(target, trials, results))
    return found


def _figure(one: Candidate, target: str, metric: str) -> float | None:
    if target == metric:
        return one.metric
    value = {"macs": one.macs, "latency_ms": one.latency_ms, "params": one.params, "bytes": one.file_bytes}.get(target)
    value = one.default if target == "default" else value
    return one.others.get(target) if value is None else float(value)


def importance_of(target: str, trials: Sequence[Candidate], results: Mapping[str, float | None]) -> Importance:
    """How much of the variance of one figure each parameter explains.

    Parameters
    ----------
    target
        What the figure is called.
    trials
        With their parameters.
    results
        The figure by trial; trials without one do not count.

    Returns
    -------
    Importance
        With a note in place of shares where there are too few trials, or where they do not show any.
    """
    used = [one for one in trials if _finite(results.get(one.id))]
    parameters = [flat(one.parameters) for one in used]
    names = sorted({name for item in parameters for name in item})
    common = [name for name in names if all(name in item for item in parameters)]
    moving = [name for name in common if len({_key(item[name]) for item in parameters}) > 1]
    left_out = [name for name in names if name not in common]
    values = [float(results[one.id] or 0.0) for one in used]

    def without(note: str, explained: float | None = None) -> Importance:
        return Importance(target, len(used), note=note, left_out=left_out, explained=explained)

    if not moving:
        return without("no parameter has more than one value in all trials")
    needed = max(LEAST_TRIALS, TRIALS_PER_PARAMETER * len(moving))
    if len(used) < needed:
        return without(
            f"{len(used)} trial{'' if len(used) == 1 else 's'} with a result, of {len(moving)} parameter"
            f"{'' if len(moving) == 1 else 's'}: too few to tell importance from noise; {needed} are needed"
        )
    if max(values) - min(values) <= 1e-12 * max(1.0, abs(max(values))):
        return without("it is the same in all trials")
    if len(used) > MOST_TRIALS:
        import numpy as np

        drawn = np.random.default_rng(0).permutation(len(used))[:MOST_TRIALS]
        parameters, values = [parameters[i] for i in drawn], [values[i] for i in drawn]
    columns = {name: _column([item[name] for item in parameters]) for name in moving}
    explained = _predicted(columns, values)
    if explained < LEAST_EXPLAINED:
        return without(
            f"in these {len(values)} trials the parameters do not predict it (cross-validated R² {explained:.2f}): "
            "any order of them would be noise",
            explained,
        )
    shares, spread = _anova(columns, values)
    order = sorted(shares, key=lambda name: -shares[name])
    return Importance(
        target,
        len(values),
        {name: shares[name] for name in order},
        {name: spread[name] for name in order},
        explained,
        left_out=left_out,
    )


def _column(values: Sequence[Any]) -> tuple[list[Any], bool]:
    """Numbers, by their logarithm where they span magnitudes; or texts, for a choice among other things."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value) for value in values):
        if min(values) > 0 and max(values) >= 50 * min(values):
            return [math.log(value) for value in values], True
        return [float(value) for value in values], True
    return [_key(value) for value in values], False


def _predicted(columns: Mapping[str, tuple[list[Any], bool]], values: Sequence[float]) -> float:
    """R² of a forest on trials that it has not seen, over all folds at once."""
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold, cross_val_predict

    parts = []
    for column, numeric in columns.values():
        if numeric:
            parts.append(np.asarray(column, dtype=float)[:, None])
        else:
            levels = sorted(set(column))
            parts.append(np.asarray([[float(item == level) for level in levels] for item in column]))
    inputs, wanted = np.hstack(parts), np.asarray(values)
    scores = []
    for seed in range(2):
        forest = RandomForestRegressor(4 * TREES, min_samples_leaf=2, random_state=seed)
        folds = KFold(min(FOLDS, len(values)), shuffle=True, random_state=seed)
        guess = cross_val_predict(forest, inputs, wanted, cv=folds)
        scores.append(1 - float(((guess - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum()))
    return float(np.mean(scores))


def _anova(
    columns: Mapping[str, tuple[list[Any], bool]], values: Sequence[float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation, over resampled trials, of Optuna's functional ANOVA."""
    import numpy as np
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(min(column), max(column))
        if numeric
        else CategoricalDistribution(tuple(sorted(set(column))))
        for name, (column, numeric) in columns.items()
    }
    numbers = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in columns}
    for seed in range(RESAMPLES):
        study = optuna.create_study()
        drawn = numbers.integers(0, len(values), len(values))
        if len({values[index] for index in drawn}) < 2:
            continue
        for index in drawn:
            chosen = {name: column[index] for name, (column, _) in columns.items()}
            study.add_trial(optuna.trial.create_trial(params=chosen, distributions=space, value=values[index]))
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
        for name, share in evaluator.evaluate(study, params=list(columns)).items():
            found[name].append(float(share))
    means = {name: float(np.mean(items)) if items else 0.0 for name, items in found.items()}
    return means, {name: float(np.std(items)) if items else 0.0 for name, items in found.items()}


def _key(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
