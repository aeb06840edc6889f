"""Five seeds of the digits recipe: is the compact model as good as the dense one at half its MACs?

    python benchmarks/digits_seeds.py [--seeds 5] [--recipe experiments/digits/recipe.yml] [--set FIELD=VALUE ...]

Each seed trains a dense model, prunes it to at most half the MACs, fine-tunes and compacts it, and reads the test split
once for both. No search: one recipe, by default the digits experiment's with half the MACs asked for. The mean test
accuracy of the compact models must be within half a point of that of the dense ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from nni_plugins.cli import parse_change
from nni_plugins.training import compress, evaluate_test, load_recipe, prepare_dense

ROOT = Path(__file__).resolve().parent.parent
HALF = {"prune.target": "macs", "prune.sparsity": 0.5, "prune.pruner": "taylor"}
POINTS = 0.5


def main() -> int:
    """Measure and print; 1 when the mean loses more than half a point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=ROOT / "experiments" / "digits" / "recipe.yml")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = load_recipe(options.recipe).with_values({**HALF, **dict(map(parse_change, options.changes))})
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            start = time.monotonic()
            recipe = base.with_values({"seed": seed})
            dense = prepare_dense(recipe, Path(name) / "dense", lambda line: None)
            metrics = compress(recipe, Path(name) / str(seed), dense)
            compact = Path(name) / str(seed) / "compact.safetensors"
            row = {
                "seed": seed,
                "dense": evaluate_test(recipe, dense.path)["accuracy"],
                "compact": evaluate_test(recipe, compact)["accuracy"],
                "macs": metrics["macs"] / dense.macs,
                "relative_error": metrics["relative_error"],
            }
            rows.append(row)
            accuracy = f"dense {row['dense']:.4f}, compact {row['compact']:.4f}"
            cost = f"{100 * row['macs']:.1f}% of the MACs, compact against masked {row['relative_error']:.1e}"
            print(f"seed {seed}: {accuracy}, {cost}, {time.monotonic() - start:.0f} s", flush=True)
    means = {name: statistics.mean(row[name] for row in rows) for name in ("dense", "compact")}
    points = 100 * (means["compact"] - means["dense"])
    print(f"mean test accuracy: dense {means['dense']:.4f}, compact {means['compact']:.4f}: {points:+.2f} points")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "points": points}, indent=1), encoding="utf-8")
    within = points >= -POINTS and all(row["macs"] <= 0.5 and row["relative_error"] < 1e-5 for row in rows)
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
