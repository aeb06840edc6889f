"""Learning on replays: which attributes of modules count units, and so must follow when some go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations, islice

from torch import nn

from nni_plugins.channels.attributes import element, sizes_held
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array
from nni_plugins.channels.peers import Peers, Place, labelled, shrinking
from nni_plugins.channels.replay import Mismatch, Replay

Key = tuple[str, str]  # a module and a size that it holds, as of sizes_held
Try = tuple[Key, Place, Array]

#: So many sizes are let follow at once, and so many ways to choose them are tried at most.
_TOGETHER, _TRIES = 3, 60
#: So many modules below the failing one, which may read their attributes, are asked at most.
_BELOW = 12


def learn(
    graph: ChannelGraph,
    replay: Replay,
    model: nn.Module,
    modules: dict[str, nn.Module],
    mismatch: Mismatch,
    peers: Peers,
) -> Mismatch | None:
    """Let a size that the failing module or its parents hold follow the labels that change around a mismatch.

    After those, sizes that modules below it hold, whose attributes it may read (``self.encoder.width``). Where none
    helps alone, those of a tuple or list are tried together, and two or three of those that change what the failing
    operator is given: a split needs the sizes of all parts.

    Returns the next mismatch, None if there is none left, or the same one where nothing helps.
    """
    operator = mismatch.operator
    if operator is None:
        return mismatch

    def tried(tries: Sequence[Try]) -> Mismatch | None:
        """Let sizes follow, and take it back unless the replay comes further by it."""
        added = [(key, labels) for key, _, labels in tries]
        for (name, attribute), place, _ in tries:
            added += peers.same_attribute(operator, name, attribute, place)
        before = {key: list(graph.learnt.get(key, [])) for key, _ in added}
        for key, labels in added:
            graph.learnt[key] = [a for a in before[key] if len(a) != len(labels)] + [labels]
        after: Mismatch | None = mismatch
        try:
            after = replay.run(model)
        finally:
            if after is not None and after.index <= mismatch.index:
                graph.learnt.update(before)
        return after

    shrunk = list(shrinking(replay, operator))
    felt: list[Try] = []  # what the operator that fails is given by
    sizes = {len(labels) for _, labels in shrunk}
    upwards = ((owner, list(sizes_held(modules.get(owner)))) for owner in _upwards(mismatch.module))
    below = _below(mismatch.module, modules, sizes, graph.trace.sizes)
    for owner, held in chain(upwards, islice(below, _BELOW)):
        for attribute, size in held:
            for place, labels in shrunk:
                if len(labels) != size or _follows(graph, (owner, attribute), labels):
                    continue
                alone: Try = ((owner, attribute), place, labels)
                after = tried([alone])
                if after is None or after.index > mismatch.index:
                    return after
                if after.index == mismatch.index and after.why != mismatch.why:
                    felt.append(alone)
    for tries in _together(felt, list(labelled(operator)), modules):
        after = tried(tries)
        if after is None or after.index > mismatch.index:
            return after
    return mismatch


def _upwards(name: str) -> Iterator[str]:
    """Yield the name of a module and those of its parents."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _below(
    name: str, modules: dict[str, nn.Module], sizes: Collection[int], known: Collection[Key]
) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield the modules below one that hold one of ``sizes``, and what they hold, the nearest first.

    Of each class the first only. Most attributes of torch's own have a known meaning, and follow by themselves; of
    these the others count, such as a GRUCell's ``hidden_size``, and those of every module: it serves many ends.
    """
    prefix = f"{name}." if name else ""
    seen: set[tuple[type, int]] = set()
    for below in sorted((n for n in modules if n and n.startswith(prefix)), key=lambda n: n.count(".")):
        kind, held = (type(modules[below]), below.count(".")), list(sizes_held(modules[below]))
        if kind[0].__module__.startswith("torch.nn."):
            held = [(attribute, size) for attribute, size in held if (below, attribute) not in known]
        elif kind in seen:
            continue
        seen.add(kind)
        if any(size in sizes for _, size in held):
            yield below, held


def _together(
    felt: Sequence[Try], places: Sequence[tuple[Place, Array]], modules: dict[str, nn.Module]
) -> Iterator[list[Try]]:
    """Yield sizes to let follow at once: all of a tuple or list in the order of the operator's tensors, then a few."""
    held = {((owner, element(name)[0])) for (owner, name), _, _ in felt if element(name)[1] is not None}
    for owner, attribute in sorted(held):
        tries: list[Try] = []
        left = list(places)
        for name, size in sizes_held(modules[owner]):
            fits = [place for place in left if len(place[1]) == size]
            if element(name)[0] == attribute and fits:
                left.remove(fits[0])
                tries.append(((owner, name), *fits[0]))
        yield tries
    count = 0
    for together in range(2, _TOGETHER + 1):
        for tries in map(list, combinations(felt, together)):
            if len({key for key, _, _ in tries}) == together:
                count += 1
                if count > _TRIES:
                    return
                yield tries


def _follows(graph: ChannelGraph, key: Key, labels: Array) -> bool:
    return any(labels is known for known in graph.learnt.get(key, []))
