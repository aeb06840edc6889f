"""``nni-plugins new``: an experiment for the user's own model, tried before it is written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.scaffold_code import bring, dotted, reference_of
from nni_plugins.experiment.scaffold_files import readme_text, recipe_text, space_header

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.training.data import Data
    from nni_plugins.training.recipe import Recipe

DIGITS, RANDOM = "digits", "random"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
HOST = re.compile(r"(?P<user>[^@\s]+)@(?P<host>[^@:\[\]\s]+|\[[0-9a-fA-F:.]+\])(?::(?P<port>\d+))?")
LEAST, MOST = 0.1, 0.9
"""Range of the share that a stage loses, before all are scaled to the budget."""


@dataclass(frozen=True)
class Wanted:
    """What ``nni-plugins new`` was asked for; see its options."""

    folder: Path
    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    inputs: Sequence[str] = ()
    data: str = DIGITS
    macs: float = 0.5
    tuner: str = "TPE"
    trials: int = 20
    concurrency: int = 2
    epochs: int = 20
    per: str = "stage"
    remote: Sequence[str] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes
    ----------
    folder, files
        Where, and which.
    macs, params
        Of the dense model, for one input.
    groups
        How many channel groups can lose units.
    fields
        What is searched.
    least_macs
        The smallest share of the MACs that pruning can leave.
    """

    folder: Path
    files: list[str]
    macs: int
    params: int
    groups: int
    fields: list[str]
    least_macs: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "folder": str(self.folder)}


def scaffold(wanted: Wanted) -> Made:
    """Write an experiment that runs as it is.

    Parameters
    ----------
    wanted
        What was asked for.

    Raises
    ------
    ExperimentError, RecipeError, CompressionError
        In one line. Nothing is written then: the model is built, watched, and its loss computed on a batch before.
    """
    folder = wanted.folder
    if not NAME.fullmatch(folder.name):
        raise ExperimentError(f"{folder}: name the experiment by letters, digits, -, _ and .")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExperimentError(f"{folder} exists already; choose another name, or remove it")
    machines = [_machine(text) for text in wanted.remote]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ExperimentError(f"{folder}: it cannot be made ({error.strerror})") from None
    try:
        made = _write(wanted, machines, staging)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


def _write(wanted: Wanted, machines: list[dict[str, Any]], staging: Path) -> Made:
    from nni_plugins.search.spaces import dump_space
    from nni_plugins.training.recipe import load_recipe

    tree = _recipe_tree(wanted, staging)
    (staging / "recipe.yml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    recipe = load_recipe(staging / "recipe.yml").with_values(wanted.changes, "--set")
    graph, groups, least = _tried(recipe, wanted)
    space, notes = _space(graph, groups, wanted)
    tree = _merged(tree, _nested(wanted.changes))
    cost = graph.cost()
    (staging / "recipe.yml").write_text(recipe_text(tree, wanted.model), encoding="utf-8")
    (staging / "space.yml").write_text(dump_space(space, space_header(wanted.model, len(groups)), notes), "utf-8")
    config = _config(wanted)
    (staging / "config.yml").write_text(_config_text(config, wanted.folder, "config.yml"), encoding="utf-8")
    if machines:
        remote = {**config, "trainingService": {"platform": "remote", "machineList": machines}}
        (staging / "config.remote.yml").write_text(
            _config_text(remote, wanted.folder, "config.remote.yml"), encoding="utf-8"
        )
    made = Made(wanted.folder, [], int(cost.macs), int(cost.params), len(groups), list(space), round(least, 4))
    (staging / "README.md").write_text(readme_text(wanted, made, bool(machines)), encoding="utf-8")
    _check_config(staging / "config.yml")
    made.files.extend(sorted(path.name for path in staging.iterdir() if path.name != "__pycache__"))
    return made


def _recipe_tree(wanted: Wanted, staging: Path) -> dict[str, Any]:
    """The recipe as plain data, with paths as the experiment's folder sees them."""
    model, home = reference_of(wanted.model, "--model")
    data, data_home = (wanted.data, None) if ":" not in wanted.data else reference_of(wanted.data, "--data")
    if wanted.remote:  # only the experiment's folder is brought to the machines
        for place, name in ((home, model), (data_home, data)):
            if place is not None:
                bring(place, name, staging)
        home = data_home = None
    if home is not None and data_home is not None and home != data_home:
        common = Path(os.path.commonpath([home, data_home]))
        model, data = (dotted(name, place, common) for name, place in ((model, home), (data, data_home)))
        home = data_home = common
    home = home or data_home
    base = home or wanted.folder.absolute()

    def relative(path: Path) -> str:
        return path.absolute().as_posix() if wanted.remote else Path(os.path.relpath(path.absolute(), base)).as_posix()

    tree: dict[str, Any] = {"seed": 0}
    if home is not None:
        tree["folder"] = Path(os.path.relpath(home, wanted.folder.absolute())).as_posix()
    tree["model"] = {"name": model}
    if wanted.arguments:
        tree["model"]["arguments"] = dict(wanted.arguments)
    if wanted.checkpoint is not None:
        if not wanted.checkpoint.is_file():
            raise ExperimentError(f"--checkpoint {wanted.checkpoint}: there is no such file")
        tree["model"]["checkpoint"] = relative(wanted.checkpoint)
    tree["data"] = _data(wanted, data, relative)
    tree["train"] = {"epochs": wanted.epochs, "optimizer": "adamw", "learning_rate": 0.002, "threads": 1}
    tree["prune"] = {"pruner": "magnitude", "target": "macs", "sparsity": round(1 - wanted.macs, 6)}
    tree["finetune"] = {"epochs": max(1, wanted.epochs // 2) if wanted.epochs else 0, "learning_rate": 0.001}
    tree["objective"] = {"metric": "accuracy"}
    return tree


def _data(wanted: Wanted, data: str, relative: Any) -> dict[str, Any]:
    if ":" in data:
        return {"name": data}
    if data == DIGITS:
        return {"name": DIGITS, "batch_size": 64}
    if data == RANDOM:
        return {"name": "nni_plugins.training.random_data:loaders", "arguments": _random_data(wanted)}
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ExperimentError(
            f"--data {data}: there is no such folder; give a folder of images, module:function that returns "
            f"(train, validation, test) loaders, {DIGITS}, or {RANDOM} to try the model without data"
        )
    settings: dict[str, Any] = {"name": "image_folder", "root": relative(root), "batch_size": 32}
    sizes = _image_sizes(wanted.inputs)
    if sizes is not None:
        settings["arguments"] = {"size": sizes[1], "channels": sizes[0]}
    return settings


def _image_sizes(inputs: Sequence[str]) -> tuple[int, int] | None:
    """Channels and size of images, as ``--input 1x3x224x224`` says them."""
    from nni_plugins.report.inspect_target import parse_inputs

    if not inputs:
        return None
    given = parse_inputs(inputs)
    shape = tuple(getattr(given, "shape", ()))
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise ExperimentError(
            f"--input {' '.join(inputs)}: an image folder gives squares of 1 or 3 channels (1x3x32x32)"
        )
    return int(shape[1]), int(shape[2])


def _random_data(wanted: Wanted) -> dict[str, Any]:
    """Arguments of :mod:`nni_plugins.training.random_data`: the shape of ``--input``, the classes of the model."""
    import torch

    from nni_plugins.report.inspect_target import find_target
    from nni_plugins.training.loaders import apply
    from nni_plugins.training.loop import _shapes

    if not wanted.inputs:
        raise ExperimentError(f"--data {RANDOM}: say of which size, as --input 1x3x32x32")
    target = find_target(wanted.model, wanted.inputs, None, wanted.arguments)
    given = target.dummy_input
    if not isinstance(given, torch.Tensor):
        raise ExperimentError(f"--data {RANDOM} gives one input; with several, write --data module:function")
    with torch.no_grad():
        try:
            output = apply(target.model, given)
        except Exception as error:  # whatever a forward raises
            from nni_plugins.training.errors import where

            raise ExperimentError(
                f"{wanted.model}: the model fails on {target.input_text()}: {where(error)}"
            ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[1] < 2:
        raise ExperimentError(
            f"--data {RANDOM}: {wanted.model} returns {_shapes(output)}, no scores of classes; "
            "write --data module:function, and --set train.loss=... where it is no classifier"
        )
    kind = str(given.dtype).removeprefix("torch.")
    found = {"shape": list(given.shape[1:]), "classes": int(output.shape[1])}
    return found if kind == "float32" else {**found, "dtype": kind}


def _tried(recipe: Recipe, wanted: Wanted) -> tuple[ChannelGraph, list[Any], float]:
    """Build, watch and train one batch; returns the graph, its prunable groups, and the least share of MACs."""
    import torch

    from nni_plugins.channels import ChannelGraph
    from nni_plugins.report.inspect_target import input_text
    from nni_plugins.training.allocate import prunable_groups
    from nni_plugins.training.data import build_data
    from nni_plugins.training.errors import CompressionError, where
    from nni_plugins.training.loop import Loop
    from nni_plugins.training.models import build_model
    from nni_plugins.training.weights import load_weights

    data: Data = build_data(recipe)
    _check_input(data, wanted)
    model = build_model(recipe, data.shape, data.classes, recipe.seed)
    if recipe.model.checkpoint is not None:
        load_weights(model, recipe.path_of(recipe.model.checkpoint))
    try:
        graph = ChannelGraph.watch(model, data.example)
    except Exception as error:  # whatever a forward raises
        hint = f"; --data says what it is trained on ({RANDOM}: to try it without)" if wanted.data == DIGITS else ""
        shown = input_text(data.example)
        raise CompressionError(
            f"{wanted.model}: the model fails on the data's {shown}{hint}: {where(error)}"
        ) from error
    loop = Loop(recipe, data, "one batch")
    model = loop.place(model).train()
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(data.train))
        loop.training_step(batch, model)
    _check_labels(recipe, batch, wanted)
    try:
        groups = prunable_groups(recipe.prune, model, graph)
    except CompressionError as error:
        raise CompressionError(f"{wanted.model}: {error}") from None
    least = graph.cost({group.name: 1 for group in groups}).macs / (graph.cost().macs or 1)
    if least > wanted.macs:
        raise ExperimentError(
            f"--macs {wanted.macs:g}: of {wanted.model} at least {100 * least:.2g}% of the MACs stay, whatever is "
            f"pruned; give more than {least:.2g}, and see `nni-plugins inspect` for what is frozen"
        )
    return graph, groups, least


def _check_input(data: Data, wanted: Wanted) -> None:
    """Refuse data that are not of the size that ``--input`` says."""
    from nni_plugins.report.inspect_target import input_text, parse_inputs

    if not wanted.inputs:
        return
    asked, found = input_text(parse_inputs(wanted.inputs)), input_text(data.example)
    if asked.partition("x")[2] != found.partition("x")[2] and asked != found:
        raise ExperimentError(
            f"--input {asked}: the data ({wanted.data}) give {found}; name your own by --data module:function or a "
            f"folder of images, or try the model on --data {RANDOM}"
        )


def _space(graph: ChannelGraph, groups: list[Any], wanted: Wanted) -> tuple[dict[str, Any], dict[str, str]]:
    from nni_plugins.pruners.affine import begins
    from nni_plugins.search.spaces import places, sparsity_space

    space = sparsity_space(groups, wanted.per, LEAST, MOST)
    whole = graph.cost().macs or 1
    notes = {}
    for place in places(groups, wanted.per):
        members = [group for group in groups if begins(group.name, place)]
        saved = 1 - graph.cost({group.name: 1 for group in members if group.size > 1}).macs / whole
        notes[f"prune.groups.{place}"] = (
            f"{sum(group.size for group in members)} units in {len(members)} group{'s'[: len(members) - 1]}; "
            f"without them {100 * saved:.0f}% of the MACs less"
        )
    rate = "finetune.learning_rate"
    space[rate] = {"_type": "loguniform", "_value": [0.0003, 0.003]}
    notes[rate] = "of fine-tuning, after pruning"
    return space, notes


def _config(wanted: Wanted) -> dict[str, Any]:
    tuner: dict[str, Any] = {"name": wanted.tuner, "classArgs": {"optimize_mode": "maximize"}}
    if wanted.tuner == "Optuna":
        tuner = {"className": "nni_plugins.search.OptunaTuner", "codeDirectory": ".", "classArgs": {"seed": 0}}
    elif wanted.tuner == "TPE":
        tuner["classArgs"]["seed"] = 0
    return {
        "experimentName": wanted.folder.name,
        "searchSpaceFile": "space.yml",
        "trialCommand": "python -m nni_plugins.trial recipe.yml",
        "trialCodeDirectory": ".",
        "trialConcurrency": wanted.concurrency,
        "maxTrialNumber": wanted.trials,
        "tuner": tuner,
        "trainingService": {"platform": "local"},
    }


def _config_text(config: dict[str, Any], folder: Path, name: str) -> str:
    head = f"# For `nni-plugins run {folder / name}`, which looks at the machines first. Set pythonPath.\n"
    if name == "config.yml":
        head = f"# For `nni-plugins run {folder}`, or `nnictl create --config {folder / name}`.\n"
    return head + yaml.safe_dump(config, sort_keys=False)


def _check_labels(recipe: Recipe, batch: Any, wanted: Wanted) -> None:
    """Refuse numbers as labels of classes: torch takes them for probabilities, and trains."""
    import torch

    from nni_plugins.training.loaders import split_batch
    from nni_plugins.training.tasks import FOR_NUMBERS

    _, target = split_batch(batch)
    if recipe.train.loss != "cross_entropy" or not isinstance(target, torch.Tensor) or not target.is_floating_point():
        return
    if target.ndim < 2 or target.min() < 0 or (target.sum(1) - 1).abs().max() > 1e-2:
        raise ExperimentError(f"{wanted.data}: its labels are numbers, and train.loss is cross_entropy; {FOR_NUMBERS}")


def _check_config(path: Path) -> None:
    """Let NNI read it, and try the space on the recipe, as the start of the experiment will."""
    from nni_plugins.experiment.launch import load_config

    load_config(path)


def _machine(text: str) -> dict[str, Any]:
    match = HOST.fullmatch(text.strip())
    if match is None or not 0 < int(match["port"] or 22) < 65536:
        raise ExperimentError(f"--remote {text}: write user@host or user@host:port, and an IPv6 address as [::1]")
    key = next(
        (name for name in ("id_ed25519", "id_rsa") if (Path("~/.ssh").expanduser() / name).is_file()), "id_ed25519"
    )
    return {
        "host": match["host"].strip("[]"),
        "port": int(match["port"] or 22),
        "user": match["user"],
        "sshKeyFile": f"~/.ssh/{key}",
        "pythonPath": "/path/to/venv/bin",
    }


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``{'train.loss': 'mse'}`` as sections; what follows a field of names and values is a name, dots and all."""
    from nni_plugins.training.recipe import Recipe
    from nni_plugins.training.schema import field_paths

    fields = [path for path, _, _ in field_paths(Recipe)]
    tree: dict[str, Any] = {}
    for path, value in changes.items():
        known = next((one for one in fields if path == one or path.startswith(f"{one}.")), path)
        *sections, last = [*known.split("."), *([path[len(known) + 1 :]] if path != known else [])]
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _merged(tree: Any, changes: dict[str, Any]) -> dict[str, Any]:
    whole = dict(tree)
    for name, value in changes.items():
        below = isinstance(value, dict) and isinstance(whole.get(name), dict)
        whole[name] = _merged(whole[name], value) if below else value
    return whole
