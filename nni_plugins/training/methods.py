"""What each kind of pruner can be asked by a recipe, and the ``config_list`` that asks it.

Pruners of channel groups take the whole prune section. Others mask single weights, kernels or whole blocks; what they
do not have is refused in one line, before anything is trained where the recipe alone says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nni_plugins.training.allocate import begins, config_list, near
from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.schema import closest
from nni_plugins.training.sections import PruneSettings

if TYPE_CHECKING:
    from torch import nn

    from nni_plugins.channels import ChannelGraph


@dataclass(frozen=True)
class Kind:
    """What a pruner removes, and which values of the prune section it knows; None where it knows all.

    Attributes
    ----------
    units
        For messages.
    targets, scopes
        Of ``prune.target`` and ``prune.scope``; their defaults are always let pass.
    groups, rounds
        Whether ``prune.groups`` and ``prune.round_to`` mean something to it.
    """

    units: str
    targets: tuple[str, ...] | None = None
    scopes: tuple[str, ...] | None = None
    groups: bool = True
    rounds: bool = True


GROUPS = Kind("channel groups")
WEIGHTS = Kind("single weights", ("params",), ("local", "global"), rounds=False)
KERNELS = Kind("kernels", ("macs", "params"), ("local", "global"), rounds=False)
BLOCKS = Kind("whole blocks", ("macs", "params", "latency"), (), groups=False, rounds=False)
_DEFAULT = PruneSettings()


def kind_of(maker: Any, arguments: Mapping[str, Any]) -> Kind:
    """Return what a pruner's class removes; a class that is not ours is taken for one of channel groups."""
    if not inspect.isclass(maker) or not maker.__module__.startswith("nni_plugins."):
        return GROUPS
    from nni_plugins.pruners.blocks import BlockPruner
    from nni_plugins.pruners.kernels import KernelPruner
    from nni_plugins.pruners.lottery import LotteryTicketPruner
    from nni_plugins.pruners.weights import WeightPruner

    if issubclass(maker, LotteryTicketPruner):
        return GROUPS if arguments.get("by") == "groups" else WEIGHTS
    table = {WeightPruner: WEIGHTS, KernelPruner: KERNELS, BlockPruner: BLOCKS}
    return next((kind for base, kind in table.items() if issubclass(maker, base)), GROUPS)


def parameters_of(maker: Any, kind: Kind) -> Mapping[str, inspect.Parameter]:
    """Return what a pruner's constructor takes; of a lottery ticket, what the pruner within it takes too."""
    own = inspect.signature(maker).parameters
    inner = _inner(maker, kind)
    if inner is None:
        return own
    rest = {n: p for n, p in inspect.signature(inner).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    rest.pop("schedule", None)  # its rounds are its schedule
    return {**rest, **{name: item for name, item in own.items() if item.kind is not inspect.Parameter.VAR_KEYWORD}}


def _inner(maker: Any, kind: Kind) -> Any:
    from nni_plugins.pruners import GroupPruner, LotteryTicketPruner, WeightPruner

    lottery = inspect.isclass(maker) and issubclass(maker, LotteryTicketPruner)
    return None if not lottery else GroupPruner if kind is GROUPS else WeightPruner


def check_settings(settings: PruneSettings, kind: Kind) -> None:
    """Refuse what a pruner of this kind does not have.

    Raises
    ------
    RecipeError
        Naming the field, and what may be written there.
    """
    name = settings.pruner
    for field, known in (("target", kind.targets), ("scope", kind.scopes)):
        value = getattr(settings, field)
        if known is None or field in settings.arguments or value in (*known, getattr(_DEFAULT, field)):
            continue
        may = f"it takes {', '.join(known)}" if known else "leave it out"
        raise RecipeError(f"prune.{field} is {value}, which {name} does not have, since it removes {kind.units}; {may}")
    for field, has in (("groups", kind.groups), ("round_to", kind.rounds)):
        if not has and getattr(settings, field) != getattr(_DEFAULT, field):
            raise RecipeError(f"prune.{field}: {name} removes {kind.units}, to which it means nothing; leave it out")


def check_arguments(settings: PruneSettings, parameters: Mapping[str, inspect.Parameter], offered: Any) -> None:
    """Refuse arguments that the pruner's constructor does not take."""
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name in settings.arguments:
        if name in ("model", "config_list") or (name not in parameters and not anything):
            known = [item for item in parameters if item not in ("model", "config_list", *offered)]
            raise RecipeError(f"prune.arguments.{name} is not an argument of {settings.pruner}; {closest(name, known)}")


def entries_of(
    settings: PruneSettings, kind: Kind, model: nn.Module, graph: ChannelGraph,
    latency: Callable[[Mapping[str, int]], float] | None = None,
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    """Write the prune section as the ``config_list`` of a kind of pruner, and the target that its ratios count.

    Parameters
    ----------
    settings
        The prune section.
    kind
        Of :func:`kind_of`.
    model
        The dense model.
    graph
        Its channels.
    latency
        Milliseconds for the units kept of each group, where the target is the latency.
    """
    if kind is GROUPS:
        return config_list(settings, model, graph, latency)
    if kind is BLOCKS:
        found = [block.name for block in graph.blocks if block.exact]
        names = [name for name in _modules(settings, model) if name in found]
        if not names:
            some = f"; blocks are: {', '.join(found[:6])}" if found else ", since the model has none"
            raise CompressionError(f"prune: nothing that it selects is a block that can go{some}")
        return [{"op_names": names, "sparse_ratio": settings.sparsity}], settings.target
    names = [name for name in _modules(settings, model) if _has_weights(model.get_submodule(name), kind)]
    if not names:
        raise CompressionError(
            f"prune: nothing that it selects has {kind.units}; see prune.op_types, op_names, exclude"
        )
    ratios = _ratios(settings, names)
    common: dict[str, Any] = {} if settings.max_sparsity is None else {"max_sparse_ratio": settings.max_sparsity}
    if settings.exclude:
        common["exclude_op_names"] = list(settings.exclude)
    entries = [
        {"op_names": [name for name in names if ratios[name] == ratio], "sparse_ratio": ratio, **common}
        for ratio in dict.fromkeys(ratios.values())
        if ratio > 0 or not settings.groups
    ]
    if not entries:
        raise CompressionError("prune: these sparsities remove nothing; raise them")
    return entries, settings.target


def _modules(settings: PruneSettings, model: nn.Module) -> list[str]:
    """The modules that types and names select."""
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    for key in ("op_names", "exclude"):
        for name in getattr(settings, key):
            if name not in types:
                raise RecipeError(f"prune.{key}: the model has no module {name}; {near(name, list(types))}")
    for kind in settings.op_types:
        if kind not in types.values():
            raise RecipeError(f"prune.op_types: the model has no {kind}; {near(kind, sorted(set(types.values())))}")
    return [
        name
        for name, kind in types.items()
        if name not in settings.exclude
        and (not settings.op_types or kind in settings.op_types)
        and (not settings.op_names or name in settings.op_names)
    ]


def _has_weights(module: nn.Module, kind: Kind) -> bool:
    from torch import nn

    if kind is KERNELS:
        return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return any("weight" in name and p.dim() > 1 for name, p in module.named_parameters(recurse=False))


def _ratios(settings: PruneSettings, names: list[str]) -> dict[str, float]:
    """Sparsity by module: that of the longest prefix in ``prune.groups``, else ``prune.sparsity``."""
    ratios, used = {}, set()
    for name in names:
        matching = [prefix for prefix in settings.groups if begins(name, prefix)]
        used.update(matching)
        ratios[name] = settings.groups[max(matching, key=len)] if matching else settings.sparsity
    for prefix in settings.groups:
        if prefix not in used:
            raise RecipeError(
                f"prune.groups.{prefix} is the beginning of no module with weights; {near(prefix, names)}"
            )
    return ratios
