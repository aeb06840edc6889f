"""Which channel groups a model space has, over its architectures, and which share belongs to which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nni.mutable import Categorical, LabeledMutable, Mutable
from nni.mutable.annotation import MutableAnnotation
from nni.nas.nn.pytorch.base import MutableModule
from torch import nn

from nni_plugins.channels import ChannelGraph, ChannelGroup
from nni_plugins.training.allocate import producers

KEEP = "keep:"
MOST_ARCHITECTURES = 64


@dataclass
class Surveyed:
    """What was found.

    Attributes
    ----------
    names
        Groups, by the key that decides them: their own name, a stage, a beginning.
    inner
        The mutables inside, by label.
    default
        The sample of the architecture that everything else was compared with.
    looked_at
        How many architectures were watched.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    inner: dict[str, LabeledMutable] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)
    looked_at: int = 0


def survey(
    inner: nn.Module,
    frozen: Callable[[dict[str, Any]], nn.Module],
    dummy_input: Any,
    groups: str | Sequence[str],
    exact_only: bool,
) -> Surveyed:
    """Watch the default architecture, and all that differ from it in one choice.

    Parameters
    ----------
    inner
        A model, or a model space.
    frozen
        From a sample to a model.
    dummy_input
        For the watch.
    groups
        See :class:`~nni_plugins.search.pruned_space.PrunedSpace`.
    exact_only
        Leave out groups whose removal cannot equal masking.

    Raises
    ------
    ValueError
        Nothing can be pruned, or a beginning fits no group.
    """
    if isinstance(groups, str) and groups not in ("group", "stage"):
        raise ValueError(f"PrunedSpace: groups is {groups!r}; it must be 'group', 'stage' or a list of beginnings")
    found = Surveyed(inner=inner_mutables(inner))
    names: dict[str, None] = {}
    for sample in samples(found.inner):
        try:
            model = frozen(sample)
        except ValueError:  # SampleValidationError: two choices that exclude each other
            continue
        graph = ChannelGraph.watch(model, dummy_input, rehearse=not found.looked_at)  # the rest need not be exact
        if not found.looked_at:
            found.default = sample
        found.looked_at += 1
        names.update(dict.fromkeys(group.name for group in free_groups(graph, exact_only)))
    if not names:
        raise ValueError("PrunedSpace: no channel group of this model can be pruned; see `nni-plugins inspect`")
    found.names = by_key(list(names), groups)
    return found


def inner_mutables(inner: nn.Module) -> dict[str, LabeledMutable]:
    """Return the choices in a model, by label, whether it is a ModelSpace or only holds some."""
    if isinstance(inner, Mutable):
        return inner.simplify()
    found: dict[str, LabeledMutable] = {}
    for module in _outermost(inner):
        found.update(module.simplify())
    return found


def _outermost(module: nn.Module) -> Iterator[MutableModule]:
    for child in module.children():
        if isinstance(child, MutableModule):
            yield child
        else:
            yield from _outermost(child)


def samples(inner: Mapping[str, LabeledMutable]) -> Iterator[dict[str, Any]]:
    """Yield the default sample, and those that differ from it in one choice; at most 64."""
    default: dict[str, Any] = {}
    free = {label: mutable for label, mutable in inner.items() if not isinstance(mutable, MutableAnnotation)}
    for mutable in free.values():
        mutable.robust_default(default)
    yield dict(default)
    count = 1
    for label, mutable in free.items():
        values = mutable.values if isinstance(mutable, Categorical) else mutable.grid(granularity=1)
        for value in values:
            if value != default[label] and count < MOST_ARCHITECTURES:
                count += 1
                yield {**default, label: value}


def free_groups(graph: ChannelGraph, exact_only: bool) -> list[ChannelGroup]:
    """Return the groups that can lose units: those that a recipe prunes too."""
    return [
        group
        for group in graph.groups
        if group.prunable and (group.exact or not exact_only) and group.size > 1 and producers(group)
    ]


def by_key(names: Sequence[str], groups: str | Sequence[str]) -> dict[str, list[str]]:
    """Return the groups that each key decides."""
    if groups == "group":
        return {name: [name] for name in names}
    keys = stages(names) if groups == "stage" else list(groups)
    found: dict[str, list[str]] = {key: [] for key in keys}
    for name in names:
        key = longest(name, keys)
        if key is not None:
            found[key].append(name)
    for key, own in found.items():
        if not own:
            raise ValueError(f"PrunedSpace: no channel group begins with {key!r}; there are {', '.join(names[:12])}")
    return found


def stages(names: Sequence[str]) -> list[str]:
    """Return the beginnings of names, cut at the first dot that tells some apart."""
    parts = [name.partition(":")[0].split(".") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        found = list(dict.fromkeys(".".join(part[:depth]) for part in parts))
        if len(found) > 1:
            return found
    return found


def longest(name: str, keys: Iterable[str]) -> str | None:
    """Return the longest key that a group's name begins with, module by module."""
    plain = name.partition(":")[0]
    fitting = [key for key in keys if name == key or plain == key or plain.startswith(key + ".")]
    return max(fitting, key=len) if fitting else None


def label_of(key: str) -> str:
    """Return the mutable's label for a key."""
    return KEEP + key


def sparsities_of(sample: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return the sparsity of each named group in a sample: 0 where no share is given for it."""
    shares = {label[len(KEEP) :]: float(value) for label, value in sample.items() if label.startswith(KEEP)}
    found = {name: longest(name, shares) for name in names}
    return {name: 0.0 if key is None else 1 - shares[key] for name, key in found.items()}
