"""From NNI's ``config_list`` to the weights that pruners of single weights mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.scope import SETTING_KEYS, _selected, _warn_of_unknown_exclusions, canonical_names


@dataclass(frozen=True)
class WeightClaim:
    """A weight, the entry of the configuration that asks for it, and NNI's settings for it."""

    module: str
    parameter: str
    entry: int
    setting: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def pool(self) -> tuple[str, Hashable]:
        """What shares a budget: NNI's ``global_group_id`` where one is given, else the entry, target by target."""
        group, asked = self.setting.get("global_group_id"), (self.setting.get(key) for key in SETTING_KEYS[:2])
        return ("entry", (self.entry, *asked)) if group is None else ("id", group)


class SharedNames:
    """The other names of parameters that are held in several places.

    Attributes
    ----------
    aliases : dict of str to list of str
        By the first name of a tied parameter.
    """

    def __init__(self, model: nn.Module):
        first: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                self.aliases.setdefault(first[id(parameter)], []).append(name)
        self.first = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def weights_of(module: nn.Module) -> list[str]:
    """A module's ``weight``; where it has none, its own matrices (``weight_ih_l0``, ``in_proj_weight``)."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" in own:
        return ["weight"]
    return [name for name, p in own.items() if "weight" in name and p.dim() >= 2]


def resolve_weights(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> list[WeightClaim]:
    """Find the weights that a configuration asks to prune, each once, in the model's order.

    A tied weight belongs to the first entry that selects one of its places; a place that an entry excludes does not
    protect it there.

    Raises
    ------
    PruningError
        An entry is contradictory, or selects no weight.
    """
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "_nni_wrapper")), None)
    if wrapped is not None:
        raise PruningError(f"{wrapped} is wrapped by another compressor; use from_compressor, or unwrap_model() first")
    canonical = canonical_names(model)
    shared = SharedNames(model)
    claims: dict[str, WeightClaim] = {}
    for index, entry in enumerate(config_list):
        where = f"config_list[{index}]"
        chosen = {canonical[name] for name in _selected(model, entry, where)}
        _warn_of_unknown_exclusions(canonical, entry, where)
        found = False
        for module_name in chosen:
            module = model.get_submodule(module_name)
            for parameter in _target_names(module, entry, where):
                name = shared.first[f"{module_name}.{parameter}" if module_name else parameter]
                holder, _, own = name.rpartition(".")
                claims.setdefault(name, WeightClaim(holder, own, index, _setting(entry, parameter, where)))
                found = True
        if not found:
            held = f"none of the {len(chosen)} modules that it selects ({min(chosen)}) holds a weight" if chosen else (
                "no module has these types and names; see model.named_modules() for what there is"
            )  # fmt: skip
            raise PruningError(f"{where}: {held}")
    return [claims[name] for name, _ in model.named_parameters() if name in claims]


def _target_names(module: nn.Module, entry: Mapping[str, Any], where: str) -> list[str]:
    asked = entry.get("target_names")
    if not asked:
        return weights_of(module)
    bad = [name for name in asked if name.startswith(("_input", "_output"))]
    if bad:
        raise PruningError(f"{where}.target_names: {bad[0]!r} is no parameter; this pruner masks parameters only")
    # NNI's legacy form names the bias beside the weight, without a sparsity of its own
    own = dict(module.named_parameters(recurse=False))
    return [name for name in asked if name in own and (name != "bias" or "bias" in entry.get("target_settings", {}))]


def _setting(entry: Mapping[str, Any], parameter: str, where: str) -> dict[str, Any]:
    setting = {key: entry[key] for key in SETTING_KEYS if key in entry}
    setting.update({k: v for k, v in entry.get("target_settings", {}).get(parameter, {}).items() if k in SETTING_KEYS})
    ratio, threshold = setting.get("sparse_ratio"), setting.get("sparse_threshold")
    if ratio is None and threshold is None:
        raise PruningError(f"{where}: neither sparse_ratio nor sparse_threshold is given; give one of them")
    if ratio is not None and not 0 <= ratio < 1:
        raise PruningError(f"{where}.sparse_ratio is {ratio}; it must be in [0, 1), since no layer is emptied")
    least, most = setting.get("min_sparse_ratio") or 0.0, setting.get("max_sparse_ratio") or 1.0
    if least > most:
        raise PruningError(f"{where}: min_sparse_ratio {least} is above max_sparse_ratio {most}")
    return setting
