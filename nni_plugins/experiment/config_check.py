"""What NNI accepts in ``config.yml`` and cannot run, or refuses without saying why: checked before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import linecache
import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.training.errors import RecipeError
from nni_plugins.training.schema import show

PLATFORMS = ("local", "remote", "openpai", "aml", "dlc", "kubeflow", "frameworkcontroller", "adl", "hybrid")
TRIAL = "nni_plugins.trial"
WHOLE = {"trialConcurrency": True, "maxTrialNumber": False, "trialGpuNumber": False}
"""Whole numbers, and whether they must be there."""


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.yml`` as plain data.

    Raises
    ------
    ExperimentError
        In one line.
    """
    from nni_plugins.training.yaml_file import read_yaml

    try:
        content = read_yaml(path)
    except RecipeError as error:
        text = str(error).removeprefix(f"{path} ").removeprefix(f"{path.name}").removeprefix(":").strip()
        raise ExperimentError(f"{path}: cannot be read ({text.removeprefix('cannot be read: ')})") from None
    if not isinstance(content, dict):
        raise ExperimentError(f"{path}: is not an experiment's configuration; it must be a mapping")
    return content


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Refuse what cannot be.

    Parameters
    ----------
    content
        What :func:`read_config` returned.
    path
        Of the file, for the message; paths in it start at its folder.

    Raises
    ------
    ExperimentError
        In one line: the field as it is written in the file, what is wrong, what to write.
    """
    known = _fields()
    found: dict[str, Any] = {}
    for name, value in content.items():
        field = known.get(_plain(name))
        if field is None:
            near = difflib.get_close_matches(str(name), known.values(), 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "NNI's fields begin with experimentName, trialCommand ..."
            raise ExperimentError(f"{path}: {name} is not a field of an experiment; {hint}")
        found[field] = value
    try:
        _check_numbers(found)
        _check_command(found.get("trialCommand"))
        _check_service(found.get("trainingService"))
        space = found.get("searchSpace")
        if space is not None and not isinstance(space, Mapping):
            raise ExperimentError(f"searchSpace is {show(space)}; it must be names, each with _type and _value")
        algorithms = [kind for kind in ("tuner", "assessor", "advisor") if found.get(kind) is not None]
        if not {"tuner", "advisor"} & set(algorithms):
            raise ExperimentError("tuner is missing; write tuner: {name: TPE, classArgs: {optimize_mode: maximize}}")
        for kind in algorithms:
            _check_algorithm(kind, found[kind], path.parent)
    except ExperimentError as error:
        raise ExperimentError(f"{path}: {error}") from None


def reason_of(error: BaseException) -> str:
    """Say in words why NNI refuses a configuration; some of its checks are an ``assert`` without a text."""
    words = " ".join(str(error).split())
    if "_MISSING_TYPE" in words:
        return "a section that it needs is missing, such as trainingService: {platform: local}"
    if words:
        return words
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno).strip() if frame else ""
    if isinstance(error, AssertionError) and line.startswith("assert "):
        return f"it wants {line.removeprefix('assert ').replace('self.', '')}"
    return type(error).__name__


def _fields() -> dict[str, str]:
    """NNI's fields as a file has them, by their names without case and underscores."""
    from nni.experiment.config import ExperimentConfig

    names = [field.name for field in dataclasses.fields(ExperimentConfig)]
    camel = [name.split("_")[0] + "".join(part.title() for part in name.split("_")[1:]) for name in names]
    return {_plain(name): name for name in camel}


def _plain(name: Any) -> str:
    return str(name).lower().replace("_", "")


def _check_numbers(found: Mapping[str, Any]) -> None:
    for name, needed in WHOLE.items():
        value, least = found.get(name), 0 if name == "trialGpuNumber" else 1
        if value is None:
            if needed:
                raise ExperimentError(f"{name} is missing; it says how many trials run at a time")
        elif type(value) is not int or value < least:
            raise ExperimentError(f"{name} is {show(value)}; it must be a whole number, at least {least}")


def _check_command(command: Any) -> None:
    example = f"python -m {TRIAL} recipe.yml"
    if command is None:
        raise ExperimentError(f"trialCommand is missing; write trialCommand: {example}")
    if not isinstance(command, str) or not command.strip():
        raise ExperimentError(f"trialCommand is {show(command)}; it must be a line of text, such as {example}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ExperimentError(f"trialCommand {command!r} is no command ({error}, in a shell)") from None
    if TRIAL in words and not [word for word in words[words.index(TRIAL) + 1 :] if not word.startswith("-")]:
        raise ExperimentError(f"trialCommand {command!r} names no recipe; write {example}")


def _check_service(service: Any) -> None:
    example = "trainingService: {platform: local}"
    if service is None:
        raise ExperimentError(f"trainingService is missing; write {example}")
    for one in service if isinstance(service, list) else [service]:
        if not isinstance(one, Mapping):
            raise ExperimentError(f"trainingService is {show(one)}; it must be a section, such as {example}")
        platform = next((value for name, value in one.items() if _plain(name) == "platform"), None)
        if platform is None:
            raise ExperimentError(f"trainingService has no platform; write {example}")
        if platform not in PLATFORMS and not _registered_service(platform):
            near = difflib.get_close_matches(str(platform), PLATFORMS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PLATFORMS)}"
            raise ExperimentError(f"trainingService.platform is {show(platform)}; {hint}")


def _registered_service(platform: Any) -> bool:
    from nni.experiment.config import utils

    try:
        utils.training_service_config_factory(platform)
    except Exception:  # whatever NNI makes of a name that it does not know
        return False
    return True


def _check_algorithm(kind: str, section: Any, folder: Path) -> None:
    if not isinstance(section, Mapping):
        raise ExperimentError(f"{kind} is {show(section)}; it must be a section, such as {kind}: {{name: TPE}}")
    values = {_plain(name): value for name, value in section.items()}
    unknown = [name for name in section if _plain(name) not in ("name", "classname", "codedirectory", "classargs")]
    if unknown:
        raise ExperimentError(f"{kind}.{unknown[0]} is not a field; known: name, className, codeDirectory, classArgs")
    name, class_name, arguments = values.get("name"), values.get("classname"), values.get("classargs") or {}
    if not isinstance(arguments, Mapping):
        raise ExperimentError(f"{kind}.classArgs is {show(arguments)}; it must be names and values")
    if (name is None) == (class_name is None):
        raise ExperimentError(f"{kind} must have either name (one of NNI's) or className (one of yours)")
    mode = arguments.get("optimize_mode", "maximize")
    if mode not in ("maximize", "minimize"):
        raise ExperimentError(f"{kind}.classArgs.optimize_mode is {show(mode)}; it must be maximize or minimize")
    if name is not None:
        _check_named(kind, name, arguments)
    else:
        _check_class(kind, class_name, values.get("codedirectory"), folder)


def _check_named(kind: str, name: Any, arguments: Mapping[str, Any]) -> None:
    """Check one of NNI's algorithms; ours are checked by :func:`nni_plugins.search.registration.check_tuner`."""
    from nni.tools.package_utils import get_algo_meta, get_all_algo_meta

    from nni_plugins.search.registration import algorithms

    own = [meta["builtinName"] for meta in algorithms()]
    meta = get_algo_meta(name) if isinstance(name, str) else None
    if meta is None:
        if str(name).lower() in [one.lower() for one in own]:
            return
        names = [one.name for one in get_all_algo_meta()]
        near = difflib.get_close_matches(str(name), [*names, *own], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise ExperimentError(f"{kind}.name is {show(name)}; {hint}")
    module, _, attribute = meta.class_name.rpartition(".")
    if not module.startswith("nni."):
        return
    try:
        parameters = inspect.signature(getattr(import_module(module), attribute)).parameters
    except (ImportError, ValueError):  # an algorithm that needs more packages: NNI says which
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for argument in arguments:
        if argument not in parameters:
            known = f"known: {', '.join(parameters)}" if parameters else "it takes none"
            raise ExperimentError(f"{kind}.classArgs.{argument} is not an argument of {name}; {known}")


def _check_class(kind: str, class_name: Any, code: Any, folder: Path) -> None:
    if not isinstance(class_name, str) or "." not in class_name:
        raise ExperimentError(f"{kind}.className is {show(class_name)}; it must be module.Class")
    if code is None:
        raise ExperimentError(f"{kind}.codeDirectory is missing: the folder of {class_name}'s module, such as .")
    place = folder / str(code)
    if not place.is_dir():
        raise ExperimentError(f"{kind}.codeDirectory is {code}, which is no folder beside config.yml")
    module = class_name.rpartition(".")[0]
    top = module.partition(".")[0]
    if (place / top).is_dir() or (place / f"{top}.py").is_file() or top in sys.modules:
        return
    if importlib.util.find_spec(top) is None:
        raise ExperimentError(f"{kind}.className is {class_name}: there is no module {top} in {place} or installed")
