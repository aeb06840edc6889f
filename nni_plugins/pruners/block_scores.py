"""How important a block is: what its call does to what passes by, and to the loss.

- ``influence`` (block influence; Men et al., ShortGPT, 2024, equation 1): 1 − the mean cosine between a hidden state
  before and after the block, over positions.
- ``taylor`` (Molchanov et al., CVPR 2019, for a gate on the block): the change of loss to first order when what the
  block adds goes, Σ gradient · (after − before), squared, averaged over minibatches.

*Before* and *after* are the stream that the block adds to. A residual block sees it itself; of a branch it is what
the norm in front of it reads (or it itself, without one), and that plus what the branch returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.utils.evaluator import ForwardHook, Hook
from torch import Tensor, nn

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.channels.blocks import Block


class _CallHook(ForwardHook):
    """NNI's forward hook, with keyword arguments."""

    def _register(self, hook_func: Callable) -> Any:
        return self.target.register_forward_hook(hook_func, with_kwargs=True)


class BlockWatcher:
    """Gathers, over minibatches, what the score of each block is the mean of.

    Parameters
    ----------
    model : torch.nn.Module
        Holds the blocks.
    graph : ChannelGraph
        Of the model.
    blocks : iterable of Block
        Those to score.
    measure : {'influence', 'taylor'}
        What is gathered.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, blocks: Iterable[Block], measure: str):
        self.model, self.measure, self.active = model, measure, True
        self.blocks = {block.name: block for block in blocks}
        self.readers = {name: reader for name, block in self.blocks.items() if (reader := _reader(graph, block))}
        self.reshaping: set[str] = set()
        """Blocks that read another shape than they add to, of which no influence can be told."""
        self.reset()

    def reset(self) -> None:
        """Forget all minibatches."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._now: dict[str, Tensor] = {}
        self._streams: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last reset, at the end of a minibatch."""
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was gathered."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])

    def hooks(self) -> list[Hook]:
        """Hooks for the evaluator to register."""
        found: list[Hook] = []
        for reader in dict.fromkeys(self.readers.values()):
            found.append(_CallHook(self.model.get_submodule(reader), reader, lambda _, r=reader: self._read(r)))
        for name in self.blocks:
            found.append(_CallHook(self.model.get_submodule(name), name, lambda _, n=name: self._called(n)))
        return found

    def _read(self, reader: str) -> Callable:
        def watch(_module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            stream = _first_tensor((args, kwargs)) if self.active else None
            if stream is not None:
                self._streams[reader] = stream.detach()

        return watch

    def _called(self, name: str) -> Callable:
        block = self.blocks[name]

        def watch(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            result = _first_tensor(output) if self.active else None
            if result is None:
                return
            given = _first_tensor((args, kwargs), result.shape)
            before = self._streams.get(self.readers.get(name, ""), given)
            value = result.detach()
            if block.kind == "branch":
                added = value
            else:
                before = given
                added = value if given is None else value - given.detach()
            if self.measure == "taylor":
                if result.requires_grad:
                    added = added.clone()  # what follows may write into it
                    result.register_hook(lambda gradient: self._add(name, (gradient.detach() * added).sum()))
            elif before is not None and before.shape == added.shape:
                dim = 1 if added.dim() == 4 else -1
                cosine = torch.cosine_similarity(before.detach(), before.detach() + added, dim=dim)
                self._add(name, (1 - cosine).mean())
            else:
                self.reshaping.add(name)

        return watch

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._now[name] = self._now[name] + value if name in self._now else value

    def end_of_minibatch(self) -> None:
        """Close a minibatch; what is not finite in it (a skipped AMP step) is left out."""
        for name, value in self._now.items():
            if torch.isfinite(value):
                value = value * value if self.measure == "taylor" else value
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._now, self._streams = {}, {}

    def scores(self) -> dict[str, Tensor]:
        """Mean over minibatches by block, float64; blocks that were not called have none."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def _reader(graph: ChannelGraph, block: Block) -> str | None:
    """The module through which a branch reads the stream: the first called of those that go with it, in front of it."""
    if block.kind != "branch" or block.name not in graph.remover.spans:
        return None
    start = min(span.start for span in graph.remover.spans[block.name])
    along = {name.rpartition(".")[0] for name in block.gone - set(block.parameters)}
    in_front = [
        (min(span.start for span in graph.remover.spans[module]), module)
        for module in along
        if module in graph.remover.spans and not block.name.startswith(f"{module}.")
    ]
    return min(((at, module) for at, module in in_front if at < start), default=(0, None))[1]


def _first_tensor(value: Any, shape: torch.Size | None = None) -> Tensor | None:
    """The first tensor of floating point in nested containers; of a shape, if one is given."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and shape in (None, value.shape) else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for item in items if (found := _first_tensor(item, shape)) is not None), None)
