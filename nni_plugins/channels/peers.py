"""The same place in other modules: what one forward teaches holds for all modules of its class."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nni_plugins.channels.attributes import size_at
from nni_plugins.channels.call import Info, Operator
from nni_plugins.channels.graph import ChannelGraph, ChannelGroup
from nni_plugins.channels.labels import Array
from nni_plugins.channels.replay import Replay, plain_name

Place = tuple[int, int]  # which of an operator's tensors, outputs first, and which dimension


def _tensors(operator: Operator) -> list[Info]:
    return [*operator.outputs, *operator.inputs]


def label_at(operator: Operator, place: Place) -> Array | None:
    """Return the labels of a dimension of one of an operator's tensors."""
    tensors = _tensors(operator)
    which, dim = place
    return tensors[which].labels[dim] if which < len(tensors) and dim < len(tensors[which].labels) else None


def labelled(operator: Operator) -> Iterator[tuple[Place, Array]]:
    """Yield the dimensions around an operator that carry labels; of several that carry the same, the first."""
    seen: set[int] = set()
    for which, info in enumerate(_tensors(operator)):
        for dim, labels in enumerate(info.labels):
            if labels is not None and id(labels) not in seen:
                seen.add(id(labels))
                yield (which, dim), labels


def shrinking(replay: Replay, operator: Operator) -> Iterator[tuple[Place, Array]]:
    """Yield those of :func:`labelled` that shrink."""
    for place, labels in labelled(operator):
        if replay.kept(len(labels), labels) != len(labels):
            yield place, labels


class Peers:
    """Operators at the same place of the forward of modules of the same class."""

    def __init__(self, graph: ChannelGraph, modules: dict[str, nn.Module]) -> None:
        self._graph = graph
        self._modules = modules
        self._at: dict[tuple, list[tuple[Operator, str]]] = {}
        self._signatures: dict[int, tuple[tuple, str]] = {}
        self._anchors: dict[str, tuple[str, str]] = {}

    def of(self, operator: Operator) -> list[Operator]:
        """Return the operators that stand where ``operator`` stands, in other modules."""
        return [peer for peer, _ in self._peers(operator)]

    def same_attribute(
        self, operator: Operator, owner: str, attribute: str, place: Place
    ) -> Iterator[tuple[tuple[str, str], Array]]:
        """Yield ``((module, attribute), labels)`` where a module stands to a peer as ``owner`` to ``operator``."""
        self._index()
        anchor = self._signatures[id(operator)][1]
        if owner != anchor and not owner.startswith(f"{anchor}." if anchor else ""):
            return
        below = owner[len(anchor) :]
        for peer, other in self._peers(operator):
            labels = label_at(peer, place)
            module = self._modules.get(other + below)
            if labels is not None and size_at(module, attribute) == len(labels):
                yield (other + below, attribute), labels

    def same_group(self, operator: Operator, group: ChannelGroup) -> Iterator[Array]:
        """Yield labels of what makes a group, at the same place of the forwards where peers of ``operator`` stand."""
        self._index()
        prefix = f"{self._signatures[id(operator)][1]}."
        for _, anchor in self._peers(operator):
            for member in group.producers:
                name = f"{anchor}.{member.name[len(prefix) :]}" if member.name.startswith(prefix) else ""
                labels = self._graph.trace.parameters.get(name, [])
                if member.dim < len(labels):
                    array = labels[member.dim]
                    if array is not None and member.indices.max() < len(array):
                        yield array[member.indices.ravel()]

    def _peers(self, operator: Operator) -> list[tuple[Operator, str]]:
        self._index()
        signature, _ = self._signatures[id(operator)]
        return [(peer, anchor) for peer, anchor in self._at[signature] if peer is not operator]

    def _index(self) -> None:
        if self._signatures:
            return
        counts: dict[tuple[str, str], int] = {}
        for operator in self._graph.trace.operators:
            anchor, below = self._anchor(operator.module)
            key = (operator.module, plain_name(operator.name))
            ordinal = counts[key] = counts.get(key, 0) + 1
            signature = (type(self._modules.get(anchor)), below, key[1], ordinal)
            self._signatures[id(operator)] = (signature, anchor)
            self._at.setdefault(signature, []).append((operator, anchor))

    def _anchor(self, name: str) -> tuple[str, str]:
        """Return the nearest module, from ``name`` upwards, that is none of torch's own, and the way down from it."""
        if name not in self._anchors:
            anchor = name
            while anchor and type(self._modules.get(anchor)).__module__.startswith("torch.nn."):
                anchor = anchor.rpartition(".")[0]
            self._anchors[name] = (anchor, name[len(anchor) :])
        return self._anchors[name]
