"""The recipe: one compression from model and data to compact model, as checked settings.

``load_recipe`` reads it, ``Recipe.with_values`` sets fields by dotted path (what a tuner does), and
:mod:`nni_plugins.training.pipeline` runs it. Importing this module imports neither torch nor NNI.
"""

# ruff: noqa: RUF009 (option and section return dataclass fields)
from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml

from nni_plugins.training.errors import RecipeError, first_line
from nni_plugins.training.schema import check, closest, field_paths, hints, option, plain, section, show
from nni_plugins.training.steps import USUAL, check_order

MODEL_NAMES = ("mlp", "small_cnn", "resnet8", "resnet20", "resnet56", "mobilenetv2", "staged")
DATA_NAMES = ("digits", "cifar10", "image_folder")
LOSS_NAMES = ("cross_entropy", "mse", "l1", "bce")
METRIC_NAMES = ("accuracy", "mse", "mae", "r2")
OPTIMIZER_NAMES = ("sgd", "adam", "adamw")
SCHEDULE_NAMES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class ModelSettings:
    """What is compressed."""

    name: str = option("resnet8", "a shipped model, or the user's module:function", choices=MODEL_NAMES, reference=True)
    arguments: dict[str, Any] = option({}, "keyword arguments of the model's function")
    checkpoint: str | None = option(None, "trained dense weights (safetensors or torch state dict), used as they are")


@dataclass(frozen=True)
class DataSettings:
    """Where the three splits come from."""

    name: str = option("digits", "a known data set, or the user's module:function", choices=DATA_NAMES, reference=True)
    root: str | None = option(
        None,
        "folder (or .npz archive) of the images",
        needed_for=("name", ("cifar10", "image_folder")),
    )
    arguments: dict[str, Any] = option({}, "keyword arguments of the data's function")
    batch_size: int = option(64, "images in a training step", low=1)
    validation: float = option(0.2, "share of the training images held out for validation", above=0, below=1)
    split_seed: int = option(0, "seed of the split, apart from the seed of training", low=0)
    augment: str = option("none", "random changes to training images", choices=("none", "crop", "crop_flip"))
    limit: int | None = option(None, "use only so many training images (validation included)", low=2)


@dataclass(frozen=True)
class TrainSettings:
    """How the dense model is trained, and fine-tuning where it says nothing else."""

    epochs: int = option(30, "passes over the training split", low=0)
    optimizer: str = option("sgd", "optimizer, or module:function", choices=OPTIMIZER_NAMES, reference=True)
    optimizer_arguments: dict[str, Any] = option({}, "further keyword arguments of the optimizer")
    learning_rate: float = option(0.1, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, below=1)
    weight_decay: float = option(5e-4, "decay of weights; norms and biases have none", low=0)
    schedule: str = option("cosine", "how the learning rate falls", choices=SCHEDULE_NAMES)
    warmup_epochs: float = option(1.0, "epochs of linear rise to the peak", low=0)
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "step schedule: shares of training where it falls", above=0, below=1
    )
    gamma: float = option(0.1, "step schedule: factor at each milestone", above=0, high=1)
    loss: str = option("cross_entropy", "loss(output, target), or module:function", choices=LOSS_NAMES, reference=True)
    label_smoothing: float = option(0.0, "of cross_entropy", low=0, below=1)
    metric: str = option("accuracy", "measure of quality, or module:function", choices=METRIC_NAMES, reference=True)
    higher_is_better: bool | None = option(None, "null: as the metric says; a user's own is taken as higher is better")
    clip_norm: float | None = option(None, "largest norm of the gradient", above=0)
    amp: bool = option(True, "mixed precision, where there is a GPU")
    channels_last: bool = option(False, "keep images channels last: faster convolutions on many CPUs")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    threads: int | None = option(None, "CPU threads of training; null: as torch decides", low=1)


@dataclass(frozen=True)
class PruneSettings:
    """What is removed."""

    pruner: str = option("magnitude", "name in nni_plugins.pruners.PRUNERS, nni:ClassName, module:Class, or none")
    sparsity: float = option(0.5, "share to remove, of what target names", low=0, below=1)
    target: str = option("macs", "what sparsity counts", choices=("channels", "macs", "params", "latency"))
    scope: str = option("global", "where units compete", choices=("local", "global", "isomorphic", "knapsack"))
    round_to: int = option(1, "kept units are a multiple of this", low=1)
    exact_only: bool = option(True, "leave out groups whose removal cannot equal masking")
    groups: dict[str, float] = option({}, "sparsity of the groups whose name starts with the key", low=0, below=1)
    scales: dict[str, float] = option({}, "factor of the scores of the groups whose name starts with the key (LeGR)")
    shifts: dict[str, float] = option({}, "added to these scores, in means of all groups' scores (LeGR)")
    max_sparsity: float | None = option(None, "no layer loses more than this share", above=0, below=1)
    op_types: tuple[str, ...] = option((), "module classes to prune; empty: all that can be")
    op_names: tuple[str, ...] = option((), "module names to prune; empty: all that can be")
    exclude: tuple[str, ...] = option((), "module names to leave alone")
    arguments: dict[str, Any] = option({}, "further keyword arguments of the pruner")


@dataclass(frozen=True)
class RankSettings:
    """Allocations tried before fine-tuning: each is pruned, recalibrated, and ranked on validation (EagleEye)."""

    candidates: int = option(
        0, "how many to try; the best one is fine-tuned; 0: the prune section decides alone", low=0
    )
    lowest: float = option(
        0.0, "least sparsity that a group is given, before all are scaled to the budget", low=0, below=1
    )
    highest: float = option(0.8, "greatest sparsity that a group is given", above=0, below=1)
    batches: int = option(20, "training batches that refresh the statistics of each candidate", low=0)


@dataclass(frozen=True)
class SupernetSettings:
    """One network trained at all widths, of which every trial is a slice."""

    epochs: int = option(0, "passes over the training split, after the dense training; 0: no supernet", low=0)
    smallest: float = option(0.25, "least share of a group's units that is trained", above=0, below=1)
    samples: int = option(2, "random widths in each step, beside the largest and the smallest", low=0)
    distill: bool = option(True, "narrow widths learn the outputs of the largest, not the labels")
    learning_rate: float | None = option(None, "peak learning rate; null: that of train", above=0)
    pruner: str = option("magnitude", "which units stay longest: a name in nni_plugins.pruners.PRUNERS")
    batches: int = option(20, "training batches that make the statistics of a slice afresh", low=1)


@dataclass(frozen=True)
class FinetuneSettings:
    """Training after pruning; null takes the value of train."""

    epochs: int = option(10, "passes over the training split", low=0)
    learning_rate: float | None = option(0.02, "peak learning rate", above=0)
    weight_decay: float | None = option(None, "decay of weights", low=0)
    schedule: str | None = option(None, "how the learning rate falls", choices=SCHEDULE_NAMES)
    warmup_epochs: float | None = option(None, "epochs of linear rise to the peak", low=0)


@dataclass(frozen=True)
class DistillSettings:
    """A teacher for fine-tuning."""

    method: str = option(
        "none",
        "kd and dkd: the teacher's outputs; feature: what its layers return, on the channels that are kept",
        choices=("none", "kd", "dkd", "feature"),
    )
    weight: float = option(1.0, "of the teacher's part beside the task's loss", above=0)
    temperature: float = option(4.0, "of kd and dkd", above=0)
    alpha: float = option(1.0, "dkd: weight of the part on the right class", low=0)
    beta: float = option(8.0, "dkd: weight of the part on the other classes", low=0)
    warmup_epochs: float = option(1.0, "epochs in which the teacher's part rises to its weight", low=0)
    layers: tuple[str, ...] = option((), "feature: module names; empty: one for each channel group")
    teacher: str = option("dense", "the dense model, or the user's module:function", choices=("dense",), reference=True)
    teacher_arguments: dict[str, Any] = option({}, "keyword arguments of the teacher's function")
    teacher_checkpoint: str | None = option(None, "trained weights of the teacher")
    ablation: bool = option(True, "the report fine-tunes the winner without the teacher too, and says what it adds")


@dataclass(frozen=True)
class SpeedupSettings:
    """Taking the removed units out, and proving it."""

    recalibrate_batches: int = option(0, "training batches that refresh batch-norm statistics after fine-tuning", low=0)
    tolerance: float = option(1e-5, "largest error of the compact model, in shares of the output's size", above=0)
    keep_masked: bool = option(True, "write the masked model's weights beside the compact ones")


@dataclass(frozen=True)
class QuantizeSettings:
    """Whole numbers in place of floats, after everything else."""

    method: str = option(
        "none",
        "ptq looks at batches; qat and lsq train with rounding (NNI's quantisers)",
        choices=("none", "ptq", "qat", "lsq"),
    )
    epochs: int = option(3, "passes over the training split, of qat and lsq", low=1)
    learning_rate: float = option(0.002, "peak learning rate, of qat and lsq", above=0)
    calibrate_batches: int = option(20, "batches that ranges are taken from before anything is rounded", low=1)
    weight_bits: int = option(8, "bits of a weight; each output channel has its own scale", low=2, high=8)
    activation_bits: int = option(8, "bits of an activation; each tensor has one scale", low=2, high=8)
    activations: str = option(
        "auto",
        "affine: unsigned with a zero point, what CPUs are fast at; symmetric: signed around 0, what TensorRT takes; "
        "auto: affine, but for lsq",
        choices=("auto", "affine", "symmetric"),
    )
    exclude: tuple[str, ...] = option((), "modules that stay in float, with all below them")


@dataclass(frozen=True)
class ExportSettings:
    """Files for other runtimes."""

    formats: tuple[str, ...] = option(
        (),
        "onnx: compact.onnx, and int8.onnx where the model is quantised; pt2: torch.export; tensorrt: onnx, checked "
        "against TensorRT's documented rules",
        choices=("onnx", "pt2", "tensorrt"),
    )
    dynamic_batch: bool = option(True, "leave the size of the batch free, where the model allows it")
    opset: int | None = option(None, "of ONNX; null: the exporter's own", low=17)


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a search maximises: one quantity under bounds on the others."""

    metric: str = option(
        "accuracy",
        "what is made best: accuracy (train.metric on validation), or the cost that is made small",
        choices=("accuracy", "macs", "params", "bytes", "latency_ms"),
    )
    macs: float | None = option(None, "bound: share of the dense model's MACs; above 1, a number of MACs", above=0)
    params: float | None = option(
        None, "bound: share of the dense model's parameters; above 1, a number of them", above=0
    )
    bytes: float | None = option(None, "bound: share of the size of the dense model's file; above 1, bytes", above=0)
    latency_ms: float | None = option(None, "bound: milliseconds of one input on one thread", above=0)
    accuracy: float | None = option(None, "bound: worst validation metric that is accepted")
    penalty: float = option(10.0, "lost per unit of relative excess over the bounds", above=0)
    skip_infeasible: bool = option(True, "no fine-tuning once the plan breaks a bound on a cost")


@dataclass(frozen=True)
class SearchSettings:
    """How much of the recipe a trial does, and what is left for the end of the search."""

    mode: str = option("full", "quick: a trial prunes and recalibrates, without fine-tuning", choices=("full", "quick"))
    finetune_best: int = option(3, "how many of the best quick trials are fine-tuned when the search is over", low=1)


@dataclass(frozen=True)
class Recipe:
    """A whole compression."""

    seed: int = option(0, "seed of weights, data order and pruners", low=0, below=2**32)
    steps: tuple[str, ...] = option(
        USUAL, "what is done, in order; an order that cannot work is refused", choices=USUAL
    )
    folder: str | None = option(None, "where relative paths and module:function start; null: the recipe's own folder")
    model: ModelSettings = section(ModelSettings)
    data: DataSettings = section(DataSettings)
    train: TrainSettings = section(TrainSettings)
    prune: PruneSettings = section(PruneSettings)
    rank: RankSettings = section(RankSettings)
    supernet: SupernetSettings = section(SupernetSettings)
    finetune: FinetuneSettings = section(FinetuneSettings)
    distill: DistillSettings = section(DistillSettings)
    speedup: SpeedupSettings = section(SpeedupSettings)
    quantize: QuantizeSettings = section(QuantizeSettings)
    export: ExportSettings = section(ExportSettings)
    objective: ObjectiveSettings = section(ObjectiveSettings)
    search: SearchSettings = section(SearchSettings)

    def with_values(self, values: Mapping[str, Any], source: str = "parameters") -> Recipe:
        """Return a recipe with some fields set.

        Parameters
        ----------
        values
            Dotted path to value. Below a field that holds names and values, the rest of the path is the name:
            ``prune.groups.layer3.0`` sets ``groups['layer3.0']``. A dictionary with ``_name``, which NNI's tuners give
            for a nested choice, sets the path to that name, and the paths that stand beside it.
        source
            What to call the values in an error.

        Raises
        ------
        RecipeError
            A path that is not a field, or a value that its field refuses.
        """
        tree = self.to_dict()
        for path, value in unnested(values).items():
            _set(tree, path, value, source)
        return _in_order(_agreeing(check(type(self), tree, source), source), source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`recipe_from_dict` reads back."""
        return plain(self)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML; it can be read back from any folder."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def path_of(self, text: str) -> Path:
        """Return the place that a path in the recipe means; ``~`` and variables such as ``$DATA`` are filled in."""
        return Path(self.folder or os.getcwd()) / Path(os.path.expandvars(text)).expanduser()

    def dense_key(self) -> str:
        """Return a short hash of what decides the dense model: two recipes with one key share one baseline."""
        from nni_plugins.training.resolve import source_digest

        tree = self.to_dict()
        decisive = {name: tree[name] for name in ("seed", "model", "data", "train")}
        decisive["train"].pop("threads")
        for name, value in (("checkpoint", self.model.checkpoint), ("root", self.data.root)):
            if value is not None:
                place = self.path_of(value)
                decisive[name] = str(place.resolve())
                if place.is_file():
                    decisive[name + "_state"] = (place.stat().st_size, place.stat().st_mtime_ns)
        named = (self.model.name, self.data.name, self.train.loss, self.train.metric, self.train.optimizer)
        decisive["code"] = [source_digest(name, self.folder) for name in named if ":" in name]
        text = json.dumps(decisive, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Parameters
    ----------
    path
        A YAML file.

    Raises
    ------
    RecipeError
        In one line: the file, the field, what is wrong and what is known.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path} cannot be read: {reason}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path.name}:{where} {problem}") from None
    except RecursionError:
        raise RecipeError(f"{path.name} is nested too deep") from None
    except ValueError as error:  # a number of more digits than Python reads, a date that is none
        raise RecipeError(f"{path.name}: {first_line(error)}") from None
    try:
        return recipe_from_dict(tree, path.name, path.parent)
    except RecursionError:
        raise RecipeError(f"{path.name} is nested in itself, by an alias") from None


def recipe_from_dict(tree: Any, source: str = "recipe", folder: str | Path | None = None) -> Recipe:
    """Check plain data as a recipe; relative paths in it start at ``folder`` unless it says otherwise."""
    recipe = _in_order(_agreeing(check(Recipe, tree, source), source), source)
    base = Path(folder or os.getcwd()).absolute()
    own = base / recipe.folder if recipe.folder else base
    return recipe.with_values({"folder": str(own)}, source)


def _agreeing(recipe: Recipe, source: str) -> Recipe:
    """Refuse an option of a pruner that may be one of a few texts, and is none of them."""
    from nni_plugins.pruners.choices import CHOICES

    known = CHOICES.get(recipe.prune.pruner, {})
    for name, value in recipe.prune.arguments.items():
        if name in known and value not in known[name]:
            may = ", ".join("null" if item is None else str(item) for item in known[name])
            raise RecipeError(
                f"{source}: prune.arguments.{name} is {show(value)}; of {recipe.prune.pruner} it must be one of {may}"
            )
    return recipe


def _in_order(recipe: Recipe, source: str) -> Recipe:
    """Return a recipe whose steps can follow each other."""
    wanted = [name for name, asked in (("quantize", recipe.quantize.method != "none"),) if asked]
    wanted += ["export"] if recipe.export.formats else []
    wanted += ["finetune"] if recipe.distill.method != "none" else []
    if recipe.distill.method in ("kd", "dkd") and recipe.train.loss in ("mse", "l1", "bce"):
        raise RecipeError(
            f"{source}: distill.method is {recipe.distill.method}, which compares probabilities of classes, and "
            f"train.loss {recipe.train.loss} has none; take feature"
        )
    if recipe.rank.lowest >= recipe.rank.highest:
        raise RecipeError(
            f"{source}: rank.lowest is {recipe.rank.lowest:g}; it must be below rank.highest, {recipe.rank.highest:g}"
        )
    try:
        check_order(recipe.steps, wanted)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe


def unnested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with nested choices taken apart: ``{path: {'_name': 'taylor', other: 3}}`` is two values."""
    flat: dict[str, Any] = {}
    for path, value in values.items():
        if isinstance(value, Mapping) and "_name" in value:
            flat[path] = value["_name"]
            flat.update(unnested({name: inner for name, inner in value.items() if name != "_name"}))
        else:
            flat[path] = value
    return flat


def _set(tree: dict[str, Any], path: str, value: Any, source: str) -> None:
    kind: Any = Recipe
    parts = path.split(".")
    for index, part in enumerate(parts):
        known = [field.name for field in fields(kind)]
        if part not in known:
            paths = [name for name, _, _ in field_paths(Recipe)]
            raise RecipeError(f"{source}: {path} is not a field of the recipe; {closest(path, paths)}")
        kind = hints(kind)[part]
        if not is_dataclass(kind):
            rest = ".".join(parts[index + 1 :])
            if rest and get_origin(kind) is not dict:
                raise RecipeError(
                    f"{source}: {path}: {'.'.join(parts[: index + 1])} is one value, without fields of its own"
                )
            if rest:
                tree[part][rest] = value
            else:
                tree[part] = value
            return
        tree = tree[part] if index + 1 < len(parts) else tree
    tree[parts[-1]] = value


def read_value(text: str) -> Any:
    """Return a value as a recipe would have it: ``'1e-3'`` is a number, ``'[1, 2]'`` a list.

    Raises
    ------
    yaml.YAMLError
        If it is no YAML.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    return float(str(node.value).replace("_", ""))


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
