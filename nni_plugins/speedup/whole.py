"""Which blocks the masks leave without effect: whole branches that are zero, and all that nobody needs without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from nni_plugins.channels.blocks import Block, passed_on, removal_of
from nni_plugins.channels.call import Info
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.stand_in import StandIn
from nni_plugins.channels.values import ZERO, Value
from nni_plugins.speedup.flow import Flow


def passed_blocks(graph: ChannelGraph, masked: set[str]) -> list[str]:
    """Return the names of the blocks all of whose parameters are masked, and that then pass their input on.

    That is not what the masks make of them: it is done where it is asked for.

    Parameters
    ----------
    graph
        What was watched.
    masked
        Names of the parameters that are masked whole.
    """
    if not masked:
        return []
    whole = [block for block in graph.blocks if block.removable and masked.issuperset(_weights(graph, block))]
    exact = [block for block in whole if block.exact]
    plain = [block for block in whole if block.kind == "plain" and not _inside(block, exact)]
    return [block.name for block in plain if not _inside(block, plain)]


def masked_blocks(graph: ChannelGraph, flow: Flow, passed: Sequence[str] = ()) -> list[str]:
    """Return the names of the blocks that can go, under the masks that ``flow`` has followed through the run.

    A branch goes where its result is zero, whichever of its parameters make it so.

    Parameters
    ----------
    graph
        What was watched.
    flow
        What the masks do to what flows.
    passed
        Names of blocks that pass their input on: they go, too.
    """
    masked = flow.masked_whole()
    results = [info for operator in graph.trace.operators for info in operator.outputs if flow.all_zero(info)]
    if not masked and not results and not passed:
        return []
    remover, needs = graph.remover, graph.remover.needs
    known: dict[Info, Value] = {info: ZERO for info in results if needs.value(info) is not ZERO}
    known |= {info: ZERO for name in masked for info in needs.parameters.get(name, ())}
    if not known and not masked and not passed:
        return []
    spans = [span for name in passed for span in remover.spans[name]]
    removal = remover.removed(needs.without(passed_on(needs, spans, known)))

    def goes(block: Block) -> bool:
        if block.sibling:
            return masked.issuperset(_weights(graph, block))
        return block.exact and removal.holds(block.name)

    found = [block for block in graph.blocks if block.name in passed or (block.removable and goes(block))]
    names = [block.name for block in _outermost(found)]
    try:
        removal_of(graph, names)
    except ValueError:  # then nothing would depend on the input
        return []
    return names


def without_first_cache(model: nn.Module) -> list[str]:
    """Return a line where the layer is gone that transformers' caches of keys and values are asked by: the first.

    Its layers say by ``layer_idx`` which part of a cache is theirs, and how long all of it is, the first part tells.
    """
    gone: dict[str, int] = {}
    left: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, StandIn):
            gone |= dict.fromkeys([name], min(_layer_numbers(vars(module)), default=-1))
        elif isinstance(getattr(module, "layer_idx", None), int):
            left.append(module.layer_idx)
    return [
        f"block {name}: a cache of keys and values asks layer {number} how long it is; before generating with one, "
        "number the layer_idx of the layers that are left anew"
        for name, number in gone.items()
        if left and 0 <= number < min(left)
    ]


def _layer_numbers(attributes: Mapping[str, Any]) -> Iterator[int]:
    number = attributes.get("layer_idx")
    if isinstance(number, int):
        yield number
    for value in attributes.values():
        if isinstance(value, SimpleNamespace):
            yield from _layer_numbers(vars(value))


def _outermost(blocks: Sequence[Block]) -> list[Block]:
    """Leave out blocks inside others; but name the residual blocks that make up a whole stage, not the stage."""
    residual = [block for block in blocks if block.kind == "residual"]

    def is_stage(block: Block) -> bool:
        parts = [inner.gone for inner in residual if inner.name.startswith(f"{block.name}.")]
        return block.kind == "residual" and bool(parts) and frozenset().union(*parts) == block.gone

    whole = [block for block in blocks if not is_stage(block)]
    return [block for block in whole if not _inside(block, whole)]


def _inside(block: Block, others: Sequence[Block]) -> bool:
    return any(block.name.startswith(f"{other.name}.") for other in others)


def _weights(graph: ChannelGraph, block: Block) -> list[str]:
    return [name for name in block.parameters if not graph.is_buffer[name]]
