"""What all pruners check of their arguments, in one line each."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from nni.compression.base.config import default_config_schema, trans_legacy_config_list

from nni_plugins.pruners.errors import PruningError

if TYPE_CHECKING:
    from nni.compression.utils.evaluator import Evaluator


def checked_config(config_list: Any) -> list[dict]:
    """A copy of the configuration in NNI's present form, checked by NNI's schema: one line on what it refuses."""
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(entry, dict) for entry in config_list):
        raise PruningError(
            "config_list must be a list of dictionaries, such as [{'op_types': [...], 'sparse_ratio': 0.5}]"
        )
    # a legacy entry that only excludes has been written into the others by then, and asks for nothing itself
    translated = trans_legacy_config_list(deepcopy(list(config_list)))
    asked = [entry for entry, given in zip(translated, config_list, strict=True) if not given.get("exclude")]
    _exclude_from(asked, [entry for entry in translated if entry.get("exclude")])
    for index, entry in enumerate(asked):
        for key in ("sparse_ratio", "sparse_threshold"):
            if type(entry.get(key)) is int:
                entry[key] = float(entry[key])
        try:
            default_config_schema("pruning").validate(entry)
        except Exception as error:  # of the package schema, which tells it in several lines
            raise PruningError(f"config_list[{index}]: {' '.join(str(error).split())}") from None
    return asked


def _exclude_from(asked: list[dict], excluding: list[dict]) -> None:
    """Write entries that only exclude into the others, where the list is in NNI's present form and NNI did not."""
    for entry in excluding:
        found = {key: list(entry.get(key) or ()) for key in ("op_names", "op_names_re")}
        found["op_names_re"] += [f".*{part}.*" for part in entry.get("op_partial_names") or ()]
        if not any(found.values()):  # with names, a type only narrows them
            found = {"op_types": list(entry.get("op_types") or ())}
        for other in asked:
            for key, values in found.items():
                if values:
                    other[f"exclude_{key}"] = [*other.get(f"exclude_{key}", ()), *values]


def check_whole(name: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raise where a value is no whole number of at least ``least``; None is one too, if it is ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise PruningError(f"{name} is {value!r}; it must be a whole number, at least {least}")


def check_choice(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        raise PruningError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def dummy_input_of(given: Any, evaluator: Evaluator | None) -> Any:
    if given is not None:
        return given
    found = None
    if evaluator is not None:
        # LightningEvaluator would make one from a batch, targets included: its inputs come first
        found = getattr(evaluator, "dummy_input", None)
        if found is None and hasattr(evaluator, "data_module"):
            found = evaluator.get_dummy_input()
            found = found[0] if evaluator._dummy_input is None and isinstance(found, (list, tuple)) else found
    if found is None:
        raise PruningError("no dummy_input is known; give dummy_input=… to the pruner, or to its evaluator")
    return found
