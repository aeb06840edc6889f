"""From the recipe's prune section to NNI's ``config_list``: which groups lose how much."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nni_plugins.pruners.affine import begins
from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.sections import PruneSettings

if TYPE_CHECKING:
    from torch import nn

    from nni_plugins.channels import ChannelGraph, ChannelGroup

Latency = Callable[[Mapping[str, int]], float]
MOST = 0.95  # a group loses at most this share when sparsities are scaled up


def config_list(
    settings: PruneSettings, model: nn.Module, graph: ChannelGraph, latency: Latency | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Write the prune section as NNI's ``config_list``.

    Parameters
    ----------
    settings
        Without ``groups``, one entry asks for ``sparsity`` of all that can be pruned. With ``groups`` and the target
        ``channels``, each group loses the share that its prefix says (``sparsity`` where none does). With ``groups``
        and another target, these shares say how the loss is spread, and are scaled together until ``sparsity`` of the
        whole model's MACs, parameters or latency is gone.
    model
        The dense model.
    graph
        Its channels.
    latency
        Milliseconds for the units kept of each group; only asked with ``groups`` and the target ``latency``.

    Returns
    -------
    tuple
        The list, and the target that its ratios count.

    Raises
    ------
    RecipeError
        A prefix, module name or type that matches nothing.
    CompressionError
        Nothing can be pruned, or the sparsity is out of reach.
    """
    groups = prunable_groups(settings, model, graph)
    common: dict[str, Any] = {}
    if settings.max_sparsity is not None:
        common["max_sparse_ratio"] = settings.max_sparsity
    if settings.exclude:
        common["exclude_op_names"] = list(settings.exclude)
    if not settings.groups:
        names = list(dict.fromkeys(name for group in groups for name in producers(group)))
        return [{"op_names": names, "sparse_ratio": settings.sparsity, **common}], settings.target
    ratios = group_ratios(settings, groups)
    sizes = {group.name: group.size for group in groups}
    if settings.target == "channels":
        kept = {name: whole(sizes[name], ratio, settings) for name, ratio in ratios.items()}
    else:
        kept = fit(settings, graph, sizes, ratios, latency)
    entries = [
        {"op_names": producers(group), "sparse_ratio": 1 - kept[group.name] / group.size, **common}
        for group in groups
        if kept[group.name] < group.size
    ]
    if not entries:
        raise CompressionError(
            "prune: these sparsities remove no unit of any group; raise them or lower prune.round_to"
        )
    return entries, "channels"


def prunable_groups(settings: PruneSettings, model: nn.Module, graph: ChannelGraph) -> list[ChannelGroup]:
    """Return the groups that the prune section selects and that can lose units."""
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    for key in ("op_names", "exclude"):
        for name in getattr(settings, key):
            if name not in modules:
                raise RecipeError(f"prune.{key}: the model has no module {name}; {near(name, list(modules))}")
    for kind in settings.op_types:
        if kind not in modules.values():
            raise RecipeError(f"prune.op_types: the model has no {kind}; {near(kind, sorted(set(modules.values())))}")

    def selected(group: ChannelGroup) -> bool:
        own = producers(group)
        if not own or any(name in settings.exclude for name in own):
            return False
        by_type = not settings.op_types or any(modules[name] in settings.op_types for name in own)
        return by_type and (not settings.op_names or any(name in settings.op_names for name in own))

    free = [group for group in graph.groups if group.prunable and (group.exact or not settings.exact_only)]
    found = [group for group in free if group.size > 1 and selected(group)]
    if not found:
        reasons = [group.reason for group in graph.groups if group.reason and producers(group)]
        why = f" ({reasons[0]})" if reasons and not free else ""
        raise CompressionError(
            f"prune: nothing that it selects can be pruned{why}; see prune.op_types, op_names, exclude"
        )
    return found


def producers(group: ChannelGroup) -> list[str]:
    """Return the modules whose outputs are the group's units."""
    return list(dict.fromkeys(member.module for member in group.members if member.role == "out" and member.module))


def group_ratios(settings: PruneSettings, groups: list[ChannelGroup]) -> dict[str, float]:
    """Return the sparsity that the longest matching prefix gives each group, ``prune.sparsity`` where none does."""
    used, ratios = set(), {}
    for group in groups:
        matching = [prefix for prefix in settings.groups if begins(group.name, prefix)]
        used.update(matching)
        ratios[group.name] = settings.groups[max(matching, key=len)] if matching else settings.sparsity
    for prefix in settings.groups:
        if prefix not in used:
            names = [group.name for group in groups]
            parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
            raise RecipeError(
                f"prune.groups.{prefix} is the beginning of no prunable group; {near(prefix, sorted(parts))}"
            )
    return ratios


def affine(settings: PruneSettings) -> dict[str, tuple[float, float]]:
    """Return factor and shift of scores by group prefix, where the prune section gives either."""
    prefixes = dict.fromkeys([*settings.scales, *settings.shifts])
    return {prefix: (settings.scales.get(prefix, 1.0), settings.shifts.get(prefix, 0.0)) for prefix in prefixes}


def fit(
    settings: PruneSettings, graph: ChannelGraph, sizes: Mapping[str, int], ratios: Mapping[str, float],
    latency: Latency | None = None,
) -> dict[str, int]:  # fmt: skip
    """Scale sparsities together until the budget on MACs, parameters or latency is just met.

    Parameters
    ----------
    settings
        ``target``, ``sparsity`` (of the whole model), ``round_to``, ``max_sparsity``.
    graph
        Gives the cost.
    latency
        Milliseconds for the units kept of each group; needed for that target.
    sizes, ratios
        Units of each group, and the sparsity to scale.

    Returns
    -------
    dict
        Units kept of each group: the cost is at most the budget, and one unit more of any group breaks it.
    """

    def cost(kept: Mapping[str, int]) -> float:
        fewer = {name: count for name, count in kept.items() if count < sizes[name]}
        if settings.target == "latency":
            assert latency is not None
            return latency(fewer)
        return getattr(graph.cost(fewer), settings.target)

    def scaled(scale: float) -> dict[str, int]:
        return {name: whole(sizes[name], min(ratio * scale, MOST), settings) for name, ratio in ratios.items()}

    dense = cost({})
    budget = (1 - settings.sparsity) * dense
    low, high = 0.0, MOST / max(min((ratio for ratio in ratios.values() if ratio > 0), default=1.0), 1e-6)
    if cost(scaled(high)) > budget:
        reach = 1 - cost(scaled(high)) / dense
        raise CompressionError(
            f"prune.sparsity {settings.sparsity:g} of {settings.target} is out of reach: with these prune.groups at "
            f"most {reach:.3g} can go; give more groups a sparsity above 0, or ask for less"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(scaled(middle)) <= budget else (middle, high)
    kept = scaled(high)
    wanted = {name: sizes[name] * (1 - min(ratios[name] * high, MOST)) for name in kept}
    blocked: set[str] = set()
    while len(blocked) < len(kept):  # give back what the rounding took too much
        name = max((name for name in kept if name not in blocked), key=lambda item: wanted[item] - kept[item])
        more = min(kept[name] + settings.round_to, sizes[name])
        if kept[name] < sizes[name] and ratios[name] > 0 and cost({**kept, name: more}) <= budget:
            kept[name] = more
        else:
            blocked.add(name)
    return kept


def whole(size: int, ratio: float, settings: PruneSettings) -> int:
    """Return how many of a group's units a recipe keeps at a sparsity."""
    most = 1.0 if settings.max_sparsity is None else settings.max_sparsity
    return units_kept(size, min(ratio, most), settings.round_to)


def units_kept(size: int, sparsity: float, round_to: int = 1) -> int:
    """Return how many of ``size`` units are kept: the nearest multiple of ``round_to``, and at least one."""
    kept = round(size * (1 - sparsity) / round_to) * round_to
    return min(max(kept, min(round_to, size)), size)


def near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, [item for item in known if item], 3, 0.5)
    if near:
        return f"closest: {', '.join(near)}"
    return f"known: {', '.join([item for item in known if item][:12])}"
