"""A supernet: one network trained at all widths of its channel groups, so that a trial is a slice of it.

Slimmable networks (Yu and Huang, Universally Slimmable Networks and Improved Training Techniques, ICCV 2019, section
4): every step trains the largest network, the smallest and a few random ones (the *sandwich rule*), and all but the
largest learn the largest one's outputs (*in-place distillation*). Widths differ from group to group for half of the
random ones, as in Once-for-All (Cai et al., ICLR 2020), and units are ordered by importance at the start (its section
3.3), so that a width keeps the first units of the order. Batch norms see the statistics of the batch while they train;
those of a slice are made afresh from training batches.

Nothing is wrapped and no layer is exchanged: a width is the model with masks multiplied into its parameters for a
moment, along every dimension that a group reaches. So whatever the channel graph can watch can be a supernet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nni_plugins.files import write_whole
from nni_plugins.training.allocate import prunable_groups
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.data import build_data
from nni_plugins.training.dense import DenseBaseline, dense_model
from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loop import Loop
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.weights import save_weights
from nni_plugins.training.widths import Sandwich, Widths, smallest

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph

WEIGHTS, ORDER, RECORD, CHECKPOINT = "weights.safetensors", "order.json", "supernet.json", "checkpoint.pt"


@dataclass(frozen=True)
class Supernet:
    """A trained supernet.

    Attributes
    ----------
    path
        Its weights, under the dense model's names.
    order
        JSON file: for each group its units, the most important first. A width keeps the first ones.
    accuracy, smallest
        ``train.metric`` on validation at full width, and where every group is at its smallest.
    seconds
        What training took.
    """

    path: Path
    order: Path
    accuracy: float
    smallest: float
    seconds: float = 0.0


def prepare_supernet(
    recipe: Recipe, dense: DenseBaseline, folder: str | Path, log: Callable[[str], Any] = print
) -> Supernet:
    """Train the supernet of a recipe, or read it where it has been trained already.

    Recipes that share a dense baseline and agree in ``supernet`` and in which groups are pruned share one. The first
    process to come trains it, the others wait; where it was cut off, the next goes on from its last epoch.

    Parameters
    ----------
    recipe
        Its ``supernet`` section, with epochs.
    dense
        What it starts from: the trained dense model.
    folder
        Where it is kept, beside the dense baselines.
    log
        Called with one line at a time.

    Raises
    ------
    RecipeError, CompressionError
        With a reason of one line.
    """
    from filelock import FileLock, Timeout

    home = Path(folder) / f"{recipe.dense_key()}-supernet-{supernet_key(recipe)}"
    home.mkdir(parents=True, exist_ok=True)
    found = read_supernet(home)
    if found is not None:
        return found
    lock = FileLock(str(home.with_name(home.name + ".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log("waiting for the supernet, which another trial is training")
        lock.acquire()
    try:
        return read_supernet(home) or _make(recipe, dense, home, log)
    finally:
        lock.release()


def supernet_key(recipe: Recipe) -> str:
    """Return a short hash of what decides a supernet, besides its dense baseline."""
    tree = recipe.to_dict()
    chosen = {name: tree["prune"][name] for name in ("op_types", "op_names", "exclude", "exact_only", "round_to")}
    text = json.dumps([tree["supernet"], chosen], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_supernet(home: Path) -> Supernet | None:
    """Return the supernet in a folder, or None where there is none that is whole."""
    try:
        record = json.loads((home / RECORD).read_text(encoding="utf-8"))
        found = Supernet(home / WEIGHTS, home / ORDER, **record["supernet"])
        return found if found.path.stat().st_size == record["bytes"] and found.order.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_slice(recipe: Recipe, dense: DenseBaseline, log: Callable[[str], Any] = print) -> tuple[Recipe, DenseBaseline]:
    """Return a recipe, and what it starts from, for a trial that is a slice of the supernet.

    Parameters
    ----------
    recipe
        With ``supernet.epochs``; how much each group loses is its ``prune`` section's to say.
    dense
        Of ``prepare_dense``; the supernet is kept beside it.

    Returns
    -------
    tuple
        The recipe with the pruner that keeps the first units of the supernet's order, and with statistics that are
        made afresh; the baseline with the supernet's weights, and the dense model's costs.
    """
    made = prepare_supernet(recipe, dense, dense.path.parent.parent, log)
    changed = recipe.with_values(
        {
            "prune.pruner": "order" if recipe.prune.pruner != "none" else "none",
            "prune.arguments": {"order": str(made.order)} if recipe.prune.pruner != "none" else {},
            "speedup.recalibrate_batches": recipe.speedup.recalibrate_batches or recipe.supernet.batches,
        },
        "supernet",
    )
    return changed, dataclasses.replace(dense, path=made.path)


def importance_order(recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph) -> dict[str, list[int]]:
    """Return the units of each group that can go, the most important first, as ``supernet.pruner`` scores them."""
    import copy

    from nni_plugins.training.prune import prune

    asked = recipe.with_values(
        {
            "prune.pruner": recipe.supernet.pruner,
            "prune.arguments": {},
            "prune.scope": "local",
            "prune.target": "channels",
            "prune.groups": {},
            "prune.scales": {},
            "prune.shifts": {},
            "prune.sparsity": 0.5,
        },
        "supernet",
    )
    scores = prune(asked, copy.deepcopy(model), loop, graph).scores
    groups = prunable_groups(recipe.prune, model, graph)
    missing = [group.name for group in groups if group.name not in scores]
    if missing:
        raise CompressionError(
            f"supernet.pruner {recipe.supernet.pruner} gives no scores of the channel group {missing[0]}; "
            "choose one that ranks channels, such as magnitude or taylor"
        )
    return {group.name: scores[group.name].argsort(descending=True, stable=True).tolist() for group in groups}


def _make(recipe: Recipe, dense: DenseBaseline, home: Path, log: Callable[[str], Any]) -> Supernet:
    from nni_plugins.channels import ChannelGraph

    start = time.monotonic()
    settings = recipe.supernet
    rate = settings.learning_rate or recipe.train.learning_rate
    trained = recipe.with_values({"train.epochs": settings.epochs, "train.learning_rate": rate})
    data = build_data(trained)
    loop = Loop(trained, data, "supernet training")
    model = loop.place(dense_model(recipe, data, dense.path))
    graph = ChannelGraph.watch(model, loop.place(data.example))
    seed_everything(recipe.seed + 3)
    order = _kept_order(home / ORDER, lambda: importance_order(recipe, model, loop, graph))
    widths = Widths(model, graph, order)
    log(f"supernet: training {len(order)} groups at all widths from {settings.smallest:g} for {settings.epochs} epochs")
    loop.train(model, loop.optimizer(model), Sandwich(loop, widths, recipe), checkpoint=home / CHECKPOINT)
    model.eval()
    narrow = evaluate_width(model, loop, widths, smallest(recipe, widths.sizes), settings.batches)
    full = evaluate_width(model, loop, widths, widths.sizes, settings.batches)  # whose statistics stay
    found = Supernet(home / WEIGHTS, home / ORDER, full, narrow, round(time.monotonic() - start, 3))
    log(f"supernet: {loop.metric.name} {full:.4f} at full width, {narrow:.4f} at the smallest")
    save_weights(model, found.path)
    record = {"accuracy": found.accuracy, "smallest": found.smallest, "seconds": found.seconds}
    text = json.dumps({"supernet": record, "bytes": found.path.stat().st_size}, indent=1)
    write_whole(home / RECORD, lambda part: part.write_text(text, encoding="utf-8"))
    (home / CHECKPOINT).unlink(missing_ok=True)
    return found


def evaluate_width(model: nn.Module, loop: Loop, widths: Widths, counts: Sequence[int], batches: int) -> float:
    """Return the validation metric of one width, its statistics made afresh."""
    with widths.narrowed(counts):
        recalibrate(model, loop, batches)
        return loop.evaluate(model)


def _kept_order(path: Path, make: Callable[[], dict[str, list[int]]]) -> dict[str, list[int]]:
    """The order of a training that was cut off, which its weights depend on; else a new one."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    order = make()
    write_whole(path, lambda part: part.write_text(json.dumps(order), encoding="utf-8"))
    return order
