"""Tuners on a table of 15,625 subnets of one trained net: equal trials, 20 seeds, each through NNI's own interface.

    python benchmarks/tabulated.py [--seeds 20] [--trials 60] [--double-trials 120] [--results FILE]
    python benchmarks/tabulated.py --docs docs/search-tuners.md

One objective: validation accuracy at half the dense net's MACs, by the recipe's objective (what is over the budget is
penalised). Two objectives: the hypervolume of accuracy and MACs of all that a tuner tried. Test accuracy is that of the
subnet that a tuner found best on validation. Cost: one suggestion and one result, after 1,000 finished trials.
`benchmarks/subnets/build.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.stats import t as student

import nni_plugins  # noqa: F401  (NNI on today's Python)
from benchmarks.subnets.table import Table, hypervolume
from nni_plugins.report.environment import environment
from nni_plugins.search import AMCTuner, LeGRTuner, OptunaTuner

BEGIN, END = "<!-- tables: benchmarks/tabulated.py -->", "<!-- end of tables -->"
RESULTS = ROOT / "benchmarks" / "results" / "tabulated.json"
BOTH = [{"name": "accuracy", "direction": "maximize"}, {"name": "share", "direction": "minimize"}]
SINGLE = (
    *("OptunaTuner TPE, recipe", "OptunaTuner TPE", "OptunaTuner NSGA-II, recipe", "OptunaTuner NSGA-II"),
    "OptunaTuner random, recipe",
    *("AMCTuner", "LeGRTuner", "NNI TPE", "NNI Evolution", "NNI Random"),
)
DOUBLE = ("OptunaTuner TPE", "OptunaTuner NSGA-II", "OptunaTuner NSGA-III", "NNI TPE", "NNI Evolution", "NNI Random")


def make(name: str, seed: int, table: Table, objectives: list[dict[str, str]] | None, surroundings: Any) -> Any:
    """A fresh tuner with its search space."""
    from nni.algorithms.hpo.evolution_tuner import EvolutionTuner
    from nni.algorithms.hpo.random_tuner import RandomTuner
    from nni.algorithms.hpo.tpe_tuner import TpeTuner

    space = table.ratios()
    constraints: Any = [] if objectives else None  # two objectives: there is no bound
    if name.startswith("OptunaTuner"):
        samplers = {"TPE": "tpe", "NSGA-II": "nsga2", "NSGA-III": "nsga3", "GP": "gp", "random": "random"}
        sampler = samplers[name.split()[1].strip(",")]
        own = surroundings if name.endswith("recipe") else None
        tuner: Any = OptunaTuner(sampler, objectives=objectives, constraints=constraints, seed=seed, environment=own)
    elif name == "AMCTuner":
        tuner = AMCTuner(environment=surroundings, warmup=20, seed=seed)
    elif name == "LeGRTuner":
        tuner, space = LeGRTuner(population_size=20, tournament_size=8, seed=seed), table.affine()
    elif name == "NNI TPE":
        tuner = TpeTuner("maximize", seed=seed)
    elif name == "NNI Random":
        tuner = RandomTuner(seed=seed)
    else:
        random.seed(seed)
        tuner = EvolutionTuner("maximize", population_size=20)
    if name == "NNI Evolution":
        state = np.random.RandomState(seed)
        original, np.random.RandomState = np.random.RandomState, lambda: state  # type: ignore[assignment,misc]
        try:  # it makes an unseeded one
            tuner.update_search_space(space)
        finally:
            np.random.RandomState = original  # type: ignore[misc]
    else:
        tuner.update_search_space(space)
    return tuner


def drive(tuner: Any, report: Callable[[dict[str, Any]], dict[str, Any]], trials: int, start: int = 0) -> list[Any]:
    """Ask and tell, one trial at a time, as NNI's dispatcher does; what was asked."""
    asked = []
    for number in range(start, start + trials):
        (parameters,) = tuner.generate_multiple_parameters([number], st_callback=None)
        asked.append(parameters)
        tuner.receive_trial_result(number, parameters, report(parameters))
        tuner.trial_end(number, True)
    return asked


def scalarised(table: Table) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """For tuners with one objective: accuracy less the share of the MACs."""

    def report(parameters: dict[str, Any]) -> dict[str, Any]:
        values = table.report(parameters)
        return {**values, "default": values["accuracy"] - values["share"], "feasible": True, "broken_bounds": {}}

    return report


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95% confidence interval."""
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(student.ppf(0.975, len(values) - 1)) * spread


def compare(
    seeds: int, trials: tuple[int, int], single: list[str], double: list[str], keep: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Every tuner, every seed; `keep` is called after each tuner."""
    table = Table()
    surroundings = table.environment(list(table.ratios()))
    found: dict[str, Any] = {
        "seeds": seeds,
        "trials": trials[0],
        "double_trials": trials[1],
        "single": {},
        "double": {},
    }
    found["optimum"] = float(table.reward.max())
    found["front"] = hypervolume(np.stack([table.accuracy.ravel(), table.share.ravel()], axis=1))
    for name in single:
        best, test, seconds = [], [], time.process_time()
        for seed in range(seeds):
            asked = drive(make(name, seed, table, None, surroundings), table.report, trials[0])
            at = max((table.levels(parameters) for parameters in asked), key=lambda one: table.reward[one])
            best.append(float(table.reward[at]))
            test.append(float(table.test[at]))
        found["single"][name] = {"best": best, "test": test, "seconds": time.process_time() - seconds}
        print(name, interval(best), interval(test), f"{time.process_time() - seconds:.1f} s", flush=True)
        keep(found)
    for name in double:
        areas, seconds = [], time.process_time()
        for seed in range(seeds):
            asked = drive(make(name, seed, table, BOTH, surroundings), scalarised(table), trials[1])
            levels = [table.levels(parameters) for parameters in asked]
            areas.append(hypervolume(np.array([(table.accuracy[one], table.share[one]) for one in levels])))
        found["double"][name] = {"hypervolume": areas, "seconds": time.process_time() - seconds}
        print(name, interval(areas), f"{time.process_time() - seconds:.1f} s", flush=True)
        keep(found)
    return found


def cost(name: str, table: Table, surroundings: Any, finished: int = 1000, suggestions: int = 20) -> float:
    """Milliseconds of processor time for one suggestion and one result, after so many finished trials."""
    tuner = make(name, 0, table, None, surroundings)
    space, rng, data, seen = table.affine() if name == "LeGRTuner" else table.ratios(), random.Random(0), [], set()
    while len(data) < finished:
        parameters = {
            key: rng.randrange(len(table.kept)) * spec["_value"][2] if len(spec["_value"]) == 3 else rng.uniform(0.2, 1)
            for key, spec in space.items()
        }
        if str(parameters) not in seen:
            seen.add(str(parameters))
            data.append({"parameter": parameters, "value": table.report(parameters)})
    if name == "NNI Evolution":
        drive(tuner, table.report, finished)  # it imports nothing
    else:
        tuner.import_data(data)
    drive(tuner, table.report, 2, 10 * finished)
    start = time.process_time()
    drive(tuner, table.report, suggestions, 20 * finished)
    return 1000 * (time.process_time() - start) / suggestions


def costs(names: list[str]) -> dict[str, float]:
    """:func:`cost` of each tuner; of GP after 200 trials, since it grows with their cube."""
    table = Table()
    surroundings = table.environment(list(table.ratios()))
    found = {}
    for name in names:
        few = name == "OptunaTuner GP"
        found[name] = cost(name, table, surroundings, 200 if few else 1000, 5 if few else 20)
        print(f"{name}: {found[name]:.1f} ms", flush=True)
    return found


def page(found: dict[str, Any]) -> str:
    """The tables of the documentation."""

    def row(name: str, *values: list[float]) -> str:
        cells = ["{:.4f} ± {:.4f}".format(*interval(one)) for one in values]
        return f"| {name} | {' | '.join(cells)} |"

    def ranked(part: dict[str, Any], key: str) -> list[tuple[str, Any]]:
        return sorted(part.items(), key=lambda item: -float(np.mean(item[1][key])))

    where = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    lines = [
        f"Means over {found['seeds']} seeds with 95% intervals. {where}.",
        "",
        f"**One objective**, {found['trials']} trials: validation accuracy at half the MACs. The best of all subnets "
        f"has {found['optimum']:.4f}.",
        "",
        "| tuner | best reward | its test accuracy |",
        "|---|---|---|",
        *(row(name, one["best"], one["test"]) for name, one in ranked(found["single"], "best")),
        "",
        f"**Two objectives**, {found['double_trials']} trials: hypervolume of accuracy and MACs left. That of all "
        f"subnets is {found['front']:.4f}.",
        "",
        "| tuner | hypervolume |",
        "|---|---|",
        *(row(name, one["hypervolume"]) for name, one in ranked(found["double"], "hypervolume")),
        "",
        "**Cost** of one suggestion and one result after 1,000 finished trials (GP: 200): processor time, one thread.",
        "",
        "| tuner | ms |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in found["cost"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--double-trials", type=int, default=120)
    parser.add_argument("--single", nargs="*", default=list(SINGLE))
    parser.add_argument("--double", nargs="*", default=list(DOUBLE))
    parser.add_argument("--cost", nargs="*", default=[*SINGLE[:2], "OptunaTuner GP", *SINGLE[2:]])
    parser.add_argument(
        "--results", type=Path, help="read before, and written after; default: %(default)s", default=RESULTS
    )
    parser.add_argument("--docs", type=Path, help="only write the tables of --results between the marks of this page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, Any] = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    if options.docs:
        before, rest = options.docs.read_text(encoding="utf-8").split(BEGIN)
        text = f"{before}{BEGIN}\n{page(found)}\n{END}{rest.split(END)[1]}"
        options.docs.write_text(text, encoding="utf-8")
        return

    def keep(what: dict[str, Any]) -> None:
        options.results.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")

    trials = (options.trials, options.double_trials)
    if options.single or options.double:
        found.update(compare(options.seeds, trials, options.single, options.double, keep))
    found.setdefault("cost", {}).update(costs(options.cost))
    found["environment"] = {**environment(), "optuna": version("optuna")}
    keep(found)


if __name__ == "__main__":
    main()
