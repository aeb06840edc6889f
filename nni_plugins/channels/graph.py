"""The channel graph: which indices of which parameters must be removed at once, found by watching one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn
from torch.nn.parameter import UninitializedParameter

from nni_plugins.channels.cost import Cost, CostModel
from nni_plugins.channels.groups import ChannelGroup, Member, collect_groups
from nni_plugins.channels.labels import Array, Cause, Solution
from nni_plugins.channels.trace import Trace
from nni_plugins.channels.training import add_training_only

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nni_plugins.channels.blocks import Block
    from nni_plugins.channels.removal import Remover

Units = Literal["heads", "head_dim"]

__all__ = ["ChannelGraph", "ChannelGroup", "Frozen", "Member"]


@dataclass(frozen=True)
class Frozen:
    """Something that could not be pruned: an operator that froze labels, or a parameter that the run never used.

    Attributes
    ----------
    module
        The module whose forward called the operator ('' is the model itself).
    operator
        The ATen operator, or '' where none is to blame.
    reason
        Why, in words.
    size
        How many parameter indices (channels) it froze.
    """

    module: str
    operator: str
    reason: str
    size: int


@dataclass
class ChannelGraph:
    """What one run of a model tells about its channels.

    Make one by :meth:`watch`. It holds names and indices only, never the model's tensors, so it stays true when
    parameters are wrapped, moved or trained; it is stale once shapes change.
    """

    trace: Trace
    solution: Solution
    shapes: dict[str, tuple[int, ...]]
    is_buffer: dict[str, bool]
    aliases: dict[str, list[str]]
    groups: list[ChannelGroup] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    extra_frozen: list[tuple[Array, Cause]] = field(default_factory=list)
    extra_ties: list[tuple[Array, Array]] = field(default_factory=list)
    units: Units = "heads"
    narrowed: list[Array] = field(default_factory=list)
    learnt: dict[tuple[str, str], list[Array]] = field(default_factory=dict)
    staying: dict[str, str] = field(default_factory=dict)
    _by_name: dict[str, ChannelGroup] = field(default_factory=dict)
    _cost: CostModel | None = None
    _remover: Remover | None = None

    @classmethod
    def watch(
        cls, model: nn.Module, dummy_input: Any, *, units: Units = "heads", rehearse: bool | Literal["exact"] = True
    ) -> ChannelGraph:
        """Watch one run of ``model`` on ``dummy_input`` and return its channel graph.

        The run is in eval mode, on tensors without data, so it computes nothing; the model is left exactly as it was.
        Parameters that it does not use are looked for in training mode.

        Parameters
        ----------
        model
            Any ``torch.nn.Module`` that runs. It must not be wrapped by NNI at this moment.
        dummy_input
            A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        units
            What of an attention layer can go: whole 'heads', or dimensions of every head, 'head_dim'.
        rehearse
            Run the model again with a few units gone of every prunable group, to find out which attributes must follow,
            and which groups must stay because a forward holds a fixed size. 'exact' leaves out the groups whose removal
            is not the same as masking; False leaves it all to whoever removes.

        Raises
        ------
        ValueError
            If the model is wrapped by an NNI compressor (unwrap it first), has parameters that wait for their first
            input, or returns nothing in which tensors can be found.
        """
        if units not in ("heads", "head_dim"):
            raise ValueError(f"units is {units!r}; it must be 'heads' or 'head_dim'")
        refuse_wrapped(model)
        trace = Trace.record(model, dummy_input)
        add_training_only(trace, model, dummy_input)
        shapes, is_buffer, aliases = _inventory(model)
        solution = trace.labels.solve(preferred=units == "heads")
        graph = cls(trace, solution, shapes, is_buffer, aliases, units=units)
        graph._collect()
        graph = graph._without_unread()
        return graph.rehearsed(model, dummy_input, inexact=rehearse != "exact") if rehearse else graph

    def rehearsed(self, model: nn.Module, dummy_input: Any, *, inexact: bool = True) -> ChannelGraph:
        """Return this graph with what a rehearsal finds: see :func:`nni_plugins.channels.rehearse.rehearsed`."""
        from nni_plugins.channels.rehearse import rehearsed

        return rehearsed(self, model, dummy_input, inexact=inexact)

    def rehearsed_blocks(self, model: nn.Module, dummy_input: Any) -> ChannelGraph:
        """Return this graph with those blocks known to stay that ``model`` does not run without.

        For a pruner that chooses blocks: each is removed on a skeleton, many at once. What is removed without this is
        tried by whoever removes, and put back if it fails.
        """
        from nni_plugins.channels.rehearse import blocks_rehearsed

        return blocks_rehearsed(self, model, dummy_input)

    def with_narrow_heads(self, groups: Sequence[ChannelGroup | str]) -> ChannelGraph:
        """Return the graph of the same run in which these groups of heads lose dimensions of every head instead."""
        graph = copy(self)
        graph.narrowed = [*self.narrowed, *(self.labels_of(group) for group in groups)]
        return graph.without([])._without_unread()

    def _without_unread(self) -> ChannelGraph:
        unread = list(self._unread())
        return self.without(unread) if unread else self

    def _unread(self) -> Iterable[tuple[Array, Cause]]:
        """Find what nothing that was watched reads: it may be read where the watch cannot see it (as a NumPy array)."""
        read = np.zeros(len(self.solution), dtype=bool)
        for operator in self.trace.operators:
            for contraction in operator.contractions:
                labels = contraction.left.labels[contraction.left_dim]
                if labels is not None:
                    read[self.solution.classes[labels]] = True
        for group in self.groups:
            if group.prunable and not read[group.classes].all():
                cause = Cause(group.members[0].module, "", "nothing that was watched reads it")
                yield self.labels_of(group), cause

    def labels_of(self, group: ChannelGroup | str) -> Array:
        """Return all labels of a group's units."""
        group = self.group(group) if isinstance(group, str) else group
        return np.flatnonzero(np.isin(self.solution.classes, group.classes))

    def without(self, labels: Sequence[tuple[Array, Cause]]) -> ChannelGraph:
        """Return this graph solved again with more labels frozen."""
        extra = [*self.extra_frozen, *labels]
        graph = ChannelGraph(
            self.trace,
            self.trace.labels.solve(
                extra, preferred=self.units == "heads", narrowed=self.narrowed, extra_ties=self.extra_ties
            ),
            self.shapes,
            self.is_buffer,
            self.aliases,
            extra_frozen=extra,
            extra_ties=self.extra_ties,
            units=self.units,
            narrowed=self.narrowed,
            learnt=self.learnt,
            staying=self.staying,
        )
        graph._collect()
        return graph

    def tied(self, pairs: Sequence[tuple[Array, Array]]) -> ChannelGraph:
        """Return this graph solved again with more labels that go together."""
        graph = copy(self)
        graph.extra_ties = [*self.extra_ties, *pairs]
        return graph.without([])

    def _collect(self) -> None:
        self.groups = collect_groups(self.trace, self.solution, self.is_buffer)
        self._by_name = {group.name: group for group in self.groups}
        self.frozen = list(self._why_frozen())

    def _why_frozen(self) -> Iterable[Frozen]:
        sizes: dict[Cause, int] = {}
        for group in self.groups:
            if group.cause is not None and not group.prunable:
                sizes[group.cause] = sizes.get(group.cause, 0) + group.size
        for cause, size in sizes.items():
            yield Frozen(cause.module, cause.operator, cause.why, size)
        for name, shape in self.shapes.items():
            if name not in self.trace.parameters and shape and not self.is_buffer[name]:
                yield Frozen(name.rpartition(".")[0], "", f"{name} was not used in the watched run", shape[0])

    def group(self, name: str) -> ChannelGroup:
        """Return the group called ``name``."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no channel group is called {name!r}{_near(name, self._by_name)}") from None

    @property
    def blocks(self) -> list[Block]:
        """What can go as a whole: residual blocks, their branches, experts; nested ones are all there."""
        return [self.block(name) for name in self._found_blocks()]

    def block(self, name: str) -> Block:
        """Return the block called ``name``."""
        found = self._found_blocks()
        if name not in found:
            raise KeyError(f"no block is called {name!r}{_near(name, found)}")
        if name in self.staying:
            return replace(found[name], removable=False, exact=False, reason=self.staying[name])
        return found[name]

    def _found_blocks(self) -> dict[str, Block]:
        if self.trace.blocks is None:
            from nni_plugins.channels.blocks import find_blocks

            self.trace.blocks = {block.name: block for block in find_blocks(self)}
        return self.trace.blocks

    def without_blocks(self, reasons: Mapping[str, str]) -> ChannelGraph:
        """Return this graph with blocks, by name, that cannot be removed, and why."""
        graph = copy(self)
        graph.staying = {**self.staying, **reasons}
        return graph

    @property
    def remover(self) -> Remover:
        """What goes with what."""
        if self._remover is None:
            from nni_plugins.channels.needs import Needs
            from nni_plugins.channels.removal import Remover

            self.trace.needs = self.trace.needs or Needs(self.trace)
            self._remover = Remover(self.trace.needs, self.solution, self.aliases, self.shapes)
        return self._remover

    @property
    def cost_model(self) -> CostModel:
        """Multiply-accumulates and parameters as functions of how much of each group is kept."""
        if self._cost is None:
            self._cost = CostModel(self)
        return self._cost

    def cost(self, kept: Mapping[str, int] | None = None, blocks: Sequence[str] = ()) -> Cost:
        """Return the cost of one run on the watched input, and the number of parameters.

        Parameters
        ----------
        kept
            How many units each named group keeps; a group that is not named keeps all.
        blocks
            Names of blocks that are removed, with all that nobody needs then.

        Returns
        -------
        Cost
            ``macs`` (multiply-accumulates of convolutions and matrix products), ``params``, and both per module.
        """
        from nni_plugins.channels.blocks import removal_of

        return self.cost_model.cost(kept, removal_of(self, blocks) if blocks else None)

    def group_cost(self, group: ChannelGroup | str) -> Cost:
        """Return the cost of everything that the group's members touch: what halves, roughly, if half of it goes."""
        return self.cost_model.group_cost(self.group(group) if isinstance(group, str) else group)


def _near(name: str, names: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where ``model`` is still wrapped by an NNI compressor."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the model once before watching it")
        if "_nni_wrapper" in name:
            raise ValueError("the model is wrapped by an NNI compressor; call unwrap_model() before watching it")


def _inventory(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, bool], dict[str, list[str]]]:
    shapes: dict[str, tuple[int, ...]] = {}
    is_buffer: dict[str, bool] = {}
    seen: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for buffer, tensors in ((False, model.named_parameters), (True, model.named_buffers)):
        for name, tensor in tensors(remove_duplicate=False):
            if id(tensor) in seen:
                aliases.setdefault(seen[id(tensor)], []).append(name)
                continue
            seen[id(tensor)] = name
            shapes[name] = tuple(tensor.shape)
            is_buffer[name] = buffer
    return shapes, is_buffer, aliases
