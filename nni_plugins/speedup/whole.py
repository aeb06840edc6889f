"""Which blocks the masks leave without effect: whole branches that are zero, and all that nobody needs without them."""

from __future__ import annotations

from collections.abc import Sequence

from nni_plugins.channels.blocks import Block, removal_of
from nni_plugins.channels.call import Info
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.values import ZERO, Value
from nni_plugins.speedup.flow import Flow


def masked_blocks(graph: ChannelGraph, flow: Flow, *, exact_only: bool = True) -> list[str]:
    """Return the names of the blocks that can go, under the masks that ``flow`` has followed through the run.

    A branch goes where its result is zero, whichever of its parameters make it so; a block whose removal is not the
    same as masking only where all its parameters are masked, and if that is asked for.

    Parameters
    ----------
    graph
        What was watched.
    flow
        What the masks do to what flows.
    exact_only
        Leave out blocks whose removal is not the same as masking.
    """
    masked = flow.masked_whole()
    results = [info for operator in graph.trace.operators for info in operator.outputs if flow.all_zero(info)]
    if not masked and not results:
        return []
    needs = graph.remover.needs
    known: dict[Info, Value] = {info: ZERO for info in results if needs.value(info) is not ZERO}
    known |= {info: ZERO for name in masked for info in needs.parameters.get(name, ())}
    if not known and not masked:
        return []
    removal = graph.remover.removed(needs.without(known))

    def goes(block: Block) -> bool:
        if block.kind == "plain" or block.sibling:
            weights = [name for name in block.parameters if not graph.is_buffer[name]]
            return (block.exact or not exact_only) and masked.issuperset(weights)
        return block.exact and removal.holds(block.name)

    found = [block for block in graph.blocks if block.removable and goes(block)]
    names = [block.name for block in _outermost(found)]
    try:
        removal_of(graph, names)
    except ValueError:  # then nothing would depend on the input
        return []
    return names


def _outermost(blocks: Sequence[Block]) -> list[Block]:
    """Leave out blocks inside others; but name the residual blocks that make up a whole stage, not the stage."""
    residual = [block for block in blocks if block.kind == "residual"]

    def is_stage(block: Block) -> bool:
        parts = [inner.gone for inner in residual if inner.name.startswith(f"{block.name}.")]
        return block.kind == "residual" and bool(parts) and frozenset().union(*parts) == block.gone

    whole = [block for block in blocks if not is_stage(block)]
    return [block for block in whole if not any(block.name.startswith(f"{outer.name}.") for outer in whole)]
