"""From NNI's ``config_list`` to pools of channel groups.

An entry of the list selects modules, as NNI reads it. The channel graph says what goes together, so what is
pruned is a *group*:

- a group belongs to the entry that selects the first of its producers (of its norms, where no producer is
  selected; of its consumers, for an entry with ``granularity: in_channel``). Its other members go along.
- a module that an entry excludes, and that no entry selects, protects its group whole.
- a module that two entries select belongs to the first.
- groups that may not be pruned (they reach the model's outputs, or are not exact) are left out.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.select import Pool

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph, ChannelGroup, Member
    from nni_plugins.channels.latency import LatencyTable

_logger = logging.getLogger(__name__)

SETTING_KEYS = (
    "sparse_ratio",
    "sparse_threshold",
    "max_sparse_ratio",
    "min_sparse_ratio",
    "global_group_id",
    "granularity",
    "apply_method",
)


@dataclass(frozen=True)
class Claim:
    """A group, the entry of the configuration that asks for it, and the member through which it does."""

    group: ChannelGroup
    entry: int
    module: str
    parameter: str


@dataclass(frozen=True)
class Resolved:
    """What a ``config_list`` means for a model.

    Parameters
    ----------
    claims : tuple of Claim
        The groups to prune, in forward order.
    settings : tuple of dict
        NNI's settings of each entry (``sparse_ratio`` ...).
    selected : tuple of frozenset of str
        The modules that each entry selects.
    """

    claims: tuple[Claim, ...]
    settings: tuple[dict[str, Any], ...]
    selected: tuple[frozenset[str], ...]

    def pool_keys(self) -> dict[tuple[str, Any], list[Claim]]:
        """Claims by what shares a budget: NNI's ``global_group_id`` where one is given, else the entry."""
        pools: dict[tuple[str, Any], list[Claim]] = {}
        for claim in self.claims:
            group_id = self.settings[claim.entry].get("global_group_id")
            pools.setdefault(("entry", claim.entry) if group_id is None else ("id", group_id), []).append(claim)
        return pools


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The first name of each module, by every name that it is reached by."""
    first = {id(module): name for name, module in model.named_modules()}
    return {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}


def excluded_modules(model: nn.Module, entry: Mapping[str, Any]) -> set[str]:
    """Modules that an entry excludes by name, expression or type."""
    names = set(entry.get("exclude_op_names", ()))
    types = set(entry.get("exclude_op_types", ()))
    expressions = entry.get("exclude_op_names_re", ())
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name in names or type(module).__name__ in types or any(re.match(e, name) for e in expressions)
    }


def entry_setting(entry: Mapping[str, Any], where: str, *, blocks: bool = False) -> dict[str, Any]:
    """The pruning settings of an entry, those under ``target_settings: {weight: ...}`` included.

    Of ``blocks``, which go whole, all may go, and no bounds apply to one.
    """
    setting = {key: entry[key] for key in SETTING_KEYS if key in entry}
    setting.update({k: v for k, v in entry.get("target_settings", {}).get("weight", {}).items() if k in SETTING_KEYS})
    if setting.get("sparse_ratio") is None and setting.get("sparse_threshold") is None:
        raise PruningError(f"{where}: neither sparse_ratio nor sparse_threshold is given; give one of them")
    ratio = setting.get("sparse_ratio")
    if ratio is not None and blocks and not 0 <= ratio <= 1:
        raise PruningError(f"{where}.sparse_ratio is {ratio}; it must be in [0, 1]")
    for key in ("min_sparse_ratio", "max_sparse_ratio") if blocks else ():
        if setting.get(key) is not None:
            raise PruningError(f"{where}.{key}: a block goes whole or not at all, so it has no bounds; leave {key} out")
    if ratio is not None and not blocks and not 0 <= ratio < 1:
        raise PruningError(f"{where}.sparse_ratio is {ratio}; it must be in [0, 1), since no layer is emptied")
    if setting.get("granularity", "default") not in ("default", "out_channel", "in_channel", "per_channel"):
        raise PruningError(
            f"{where}.granularity is {setting['granularity']!r}; this pruner removes whole channels: "
            "default, out_channel or in_channel"
        )
    return setting


def _selected(model: nn.Module, entry: Mapping[str, Any], where: str) -> list[str]:
    """Names of the modules that an entry selects, as NNI reads it."""
    from nni.compression.base.config import select_modules_by_config

    for key in ("op_names_re", "exclude_op_names_re"):
        for expression in entry.get(key, ()):
            try:
                re.compile(expression)
            except re.error as error:
                raise PruningError(f"{where}.{key}: {expression!r} is no regular expression ({error})") from None
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in entry.get("op_names", ()) if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), 3, 0.5)
        hint = f"closest: {', '.join(near)}" if near else "see model.named_modules() for what there is"
        raise PruningError(f"{where}.op_names: the model has no module {unknown[0]!r}; {hint}")
    return list(select_modules_by_config(model, dict(entry))[0])


def _warn_of_unknown_exclusions(known: Mapping[str, str], entry: Mapping[str, Any], where: str) -> None:
    """An exclusion that names nothing (``module.conv1``, once the wrapper is off) leaves its layer to be pruned."""
    for name in entry.get("exclude_op_names", ()):
        if name not in known:
            near = [k for k in known if k and (name.endswith(f".{k}") or k.endswith(f".{name}"))]
            near = near or difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _logger.warning(
                "%s.exclude_op_names: the model has no module %r, so it excludes nothing%s", where, name, hint
            )


def resolve(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], graph: ChannelGraph, *, exact_only: bool = True
) -> Resolved:
    """Find the groups that a configuration asks to prune.

    Raises
    ------
    PruningError
        An entry is contradictory, or selects nothing that can be pruned.
    """
    canonical = canonical_names(model)
    owner: dict[str, int] = {}
    excluded: set[str] = set()
    settings = []
    for index, entry in enumerate(config_list):
        settings.append(entry_setting(entry, f"config_list[{index}]"))
        for name in _selected(model, entry, f"config_list[{index}]"):
            owner.setdefault(canonical[name], index)
        excluded.update(canonical[name] for name in excluded_modules(model, entry))
        _warn_of_unknown_exclusions(canonical, entry, f"config_list[{index}]")
    selected = tuple(frozenset(n for n, i in owner.items() if i == index) for index in range(len(settings)))
    protected = excluded - set(owner)

    claims, reasons = [], [dict[str, str]() for _ in settings]

    def holders(member: Member) -> list[str]:
        """The modules that hold a parameter: several, where it is tied."""
        names = [member.name, *graph.aliases.get(member.name, ())]
        return list(dict.fromkeys(canonical[name.rpartition(".")[0]] for name in names))

    for group in graph.groups:
        found = _claim(group, owner, settings, holders)
        if found is None:
            continue
        touched = {holder for m in group.members if m.role in ("out", "scale") for holder in holders(m)}
        guards = sorted(touched & protected)
        if guards:
            reasons[found.entry][group.name] = f"{guards[0]} is excluded, and goes with it"
        elif not group.prunable or (exact_only and not group.exact):
            reasons[found.entry][group.name] = group.reason or "not exact (exact_only=False takes it)"
        elif group.size > 1:
            claims.append(found)
        else:
            reasons[found.entry][group.name] = "it has a single unit"
    for index, setting in enumerate(settings):
        if setting.get("sparse_ratio") != 0 and not any(claim.entry == index for claim in claims):
            earlier = bool(_selected(model, config_list[index], f"config_list[{index}]"))
            raise PruningError(f"config_list[{index}]: {_nothing(selected[index], reasons[index], earlier)}")
    return Resolved(tuple(claims), tuple(settings), selected)


def _claim(
    group: ChannelGroup,
    owner: Mapping[str, int],
    settings: Sequence[Mapping[str, Any]],
    holders: Callable[[Member], list[str]],
) -> Claim | None:
    for role in ("out", "scale", "in"):
        for member in group.members:
            entry = next((owner[name] for name in holders(member) if name in owner), None)
            if member.role != role or entry is None:
                continue
            by_consumer = settings[entry].get("granularity") == "in_channel"
            if by_consumer == (role == "in"):
                return Claim(group, entry, member.module, member.parameter)
    return None


def _nothing(selected: frozenset[str], reasons: Mapping[str, str], earlier: bool) -> str:
    """Why an entry has nothing to prune, in one line."""
    if not selected and earlier:
        return "all that it selects is selected by an earlier entry, which counts; narrow that one, or leave this out"
    if not selected:
        return "no module has these types and names; see model.named_modules() for what there is"
    if not reasons:
        return f"none of the {len(selected)} modules that it selects ({min(selected)}) has a channel that can go"
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    return f"nothing that it selects can be pruned: {shown}" + (" ..." if len(reasons) > 3 else "")


def make_pools(
    resolved: Resolved,
    current: Mapping[str, Mapping[str, Any]],
    *,
    scope: str,
    classes: Mapping[str, Hashable],
    latency: LatencyTable | None = None,
) -> list[Pool]:
    """The pools of a resolved configuration.

    Parameters
    ----------
    resolved : Resolved
        What the configuration means.
    current : mapping of str to mapping
        By group name: the settings in force now (a schedule may have lowered the ratio).
    scope : {'local', 'global', 'isomorphic'}
        The pruner's; an entry with ``global_group_id`` is ranked globally where it is local.
    classes : mapping of str to hashable
        Class of each group, for the isomorphic scope.
    latency : LatencyTable, optional
        For the target latency.

    Returns
    -------
    list of Pool
        One for each budget. With one, MACs and parameters are counted over the whole model; with several,
        each counts those of the modules that its entries select.
    """
    keys = resolved.pool_keys()
    pools = []
    for key, claims in keys.items():
        asked = {
            (current[c.group.name].get("sparse_ratio"), current[c.group.name].get("sparse_threshold")) for c in claims
        }
        if len(asked) > 1:
            raise PruningError(
                f"global_group_id {key[1]}: its entries ask for different sparsities {sorted(asked, key=str)}; give one"
            )
        ratio, threshold = asked.pop()
        by_id = key[0] == "id"
        entries = sorted({claim.entry for claim in claims})
        pools.append(
            Pool(
                name=f"global_group_id {key[1]}" if by_id else f"config_list[{entries[0]}]",
                groups=tuple(claim.group.name for claim in claims),
                sparsity=ratio,
                threshold=threshold,
                scope="global" if by_id and scope == "local" else scope,
                modules=None if len(keys) == 1 else frozenset().union(*(resolved.selected[e] for e in entries)),
                bounds={
                    c.group.name: (
                        current[c.group.name].get("min_sparse_ratio") or 0.0,
                        current[c.group.name].get("max_sparse_ratio") or 1.0,
                    )
                    for c in claims
                },
                classes=classes,
                latency=latency,
            )
        )
    return pools


def neighbourhoods(model: nn.Module, graph: ChannelGraph) -> dict[str, Hashable]:
    """The shape of each group's neighbourhood: the kinds of the modules that it touches, and how.

    Groups of one shape are ranked together under the isomorphic scope (Fang et al., Isomorphic Pruning for
    Vision Models, ECCV 2024); widths do not count.
    """
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {
        group.name: tuple(sorted((kinds.get(m.module, ""), m.parameter, m.role, m.dim) for m in group.members))
        for group in graph.groups
    }
