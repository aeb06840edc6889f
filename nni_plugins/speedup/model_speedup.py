"""ModelSpeedup: a drop-in for NNI's, which reads the channel graph, removes in place, and proves the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nni.compression.speedup import ModelSpeedup as NniModelSpeedup
from torch import nn

from nni_plugins.channels.graph import ChannelGraph, ChannelGroup, refuse_wrapped
from nni_plugins.channels.labels import Array
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.preserve import drop_caches
from nni_plugins.channels.rehearse import FIXED, settled
from nni_plugins.channels.replay import Mismatch
from nni_plugins.speedup import fold, record
from nni_plugins.speedup.activations import with_activations
from nni_plugins.speedup.compact import Compaction
from nni_plugins.speedup.divided import without_divisors
from nni_plugins.speedup.infer import MaskInference
from nni_plugins.speedup.masked_run import masks_in_force
from nni_plugins.speedup.masks import activation_masks, bake, parameter_masks, read_masks, unbake, unmasked
from nni_plugins.speedup.nodes import build_nodes
from nni_plugins.speedup.proof import Proof
from nni_plugins.speedup.replacement import Replacement
from nni_plugins.speedup.report import SpeedupReport
from nni_plugins.speedup.step import Step
from nni_plugins.speedup.verify import FaintWeights, outputs_of, random_like
from nni_plugins.speedup.whole import without_first_cache

if TYPE_CHECKING:
    from nni_plugins.channels.latency import LatencyTable

_logger = logging.getLogger(__name__)


class ModelSpeedup(NniModelSpeedup):
    """Replace a masked model by a smaller dense one that computes the same, and prove it.

    The arguments are those of ``nni.compression.speedup.ModelSpeedup``. What can go is read from the channel graph, not
    guessed from random tensors; parameters are sliced in place, keeping dtype, device, hooks and mode; constants that
    masked channels leave behind are folded into biases; and the compact model is held against the masked one.

    Parameters
    ----------
    model
        The model, unwrapped (``pruner.unwrap_model()``). It is changed in place, and is returned.
    dummy_input
        A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    masks_or_file
        NNI's masks ``{module: {target: mask}}``, or the path of a file that holds them (``torch.save`` or safetensors);
        what else is taken, :func:`~nni_plugins.speedup.masks.read_masks` says.
    map_location
        As in ``torch.load``, for a mask file.
    customized_replacers
        NNI ``Replacer`` objects; each may replace modules before the others are sliced.
    customized_mask_updaters, graph_module
        Giving one of these takes NNI's own path, unchanged.
    exact_only
        Leave alone what cannot be removed without changing the output (channels under a LayerNorm).
    verify
        Hold the compact model against the masked one. Groups that turn out wrong are put back.
    latency
        A latency table of the model (:class:`~nni_plugins.channels.latency.LatencyTable`), from which the report says
        what the compact model takes, and whether fewer MACs make it no faster. Without, no latency is told.

    Attributes
    ----------
    report
        A :class:`~nni_plugins.speedup.report.SpeedupReport`, after :meth:`speedup_model`.
    plan
        The :class:`~nni_plugins.channels.Plan` that was carried out.

    Raises
    ------
    ValueError
        In one line: a mask names a module that the model lacks, has another shape, or the model is still wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: Any,
        map_location: Any = None,
        batch_dim: int = 0,
        batch_size: int = 8,
        customized_mask_updaters: list | None = None,
        customized_replacers: list | None = None,
        graph_module: torch.fx.GraphModule | None = None,
        garbage_collect_values: bool = True,
        logger: logging.Logger | None = None,
        *,
        exact_only: bool = True,
        verify: bool = True,
        latency: LatencyTable | None = None,
    ) -> None:
        replacers = list(customized_replacers or [])  # NNI appends to the list that it is given
        self._by_nni = graph_module is not None or bool(customized_mask_updaters)
        self.report = SpeedupReport()
        self._step_timed, self._since = "", 0.0
        self.plan: Plan | None = None
        if self._by_nni:
            super().__init__(
                model,
                dummy_input,
                masks_or_file,
                map_location,
                batch_dim,
                batch_size,
                customized_mask_updaters,
                replacers,
                graph_module,
                garbage_collect_values,
                logger,
            )
            return
        refuse_wrapped(model)
        self.bound_model = model
        self.dummy_input = dummy_input
        self.batch_dim = batch_dim
        self.batch_size = batch_size
        self.masks = read_masks(masks_or_file, map_location)
        self.replacers = replacers
        self.mask_updaters: list = []
        self.node_infos: dict = {}
        self.logger = logger or _logger
        self.exact_only = exact_only
        self.verify = verify
        self.latency = latency
        self._masks = parameter_masks(model, self.masks)
        self._activations = activation_masks(model, self.masks)
        self._alive: dict[str, Array] = {}
        self._mismatches: list[Mismatch] = []

    def speedup_model(self) -> nn.Module:
        """Do it, and return the model (the same object, smaller)."""
        if self._by_nni:
            return super().speedup_model()
        if self.plan is not None:
            raise RuntimeError("the model is compact already; make another ModelSpeedup, with masks for what is left")
        with self._timed("watch"):
            graph = self._watched()
        before = graph.cost()
        # replacers read weights, and so want the masks in them; otherwise these are put in when the rest is taken out
        before_masks = bake(self.bound_model, self._masks) if self.replacers else {}
        try:
            step = self._proven(graph) if self.verify else self._compact(graph)
        except BaseException:
            unbake(self.bound_model, before_masks)
            raise
        drop_caches(self.bound_model)
        self.plan = step.compaction.plan
        replaced = step.replacement.sizes if step.replacement is not None else {}
        record.attach(self.bound_model, step.compaction, step.folded.added, replaced)
        self._fill_report(graph, before)
        self.logger.info("speedup: %s", str(self.report).replace("\n", "; "))
        return self.bound_model

    # -- the steps -------------------------------------------------------------------------------------------------

    def _watched(self) -> ChannelGraph:
        """Watch the model; of a product the factor goes that its masks ask for: dimensions of every head, not heads."""
        graph = ChannelGraph.watch(self.bound_model, self.dummy_input, rehearse=False)
        self._masks = with_activations(graph, self.bound_model, self.dummy_input, self._masks, self._activations)
        self._masks = without_divisors(graph, self._masks)
        parts = self._inference(graph).partly_masked()
        other = graph.with_narrow_heads(parts) if parts else graph
        if np.array_equal(other.solution.classes, graph.solution.classes):
            return graph
        other = other.rehearsed(self.bound_model, self.dummy_input, inexact=not self.exact_only)
        wide, narrow = (self._inference(g).plan() for g in (graph, other))
        better = [group for group in parts if _rows(narrow, group) < _rows(wide, group)]
        return graph.with_narrow_heads(better) if better else graph

    def _inference(self, graph: ChannelGraph, stay: Sequence[Array] = ()) -> MaskInference:
        if not self._alive:
            self._alive = {name: unmasked(mask) for name, mask in self._masks.items()}
        return MaskInference(
            graph, self.bound_model, self._masks, exact_only=self.exact_only, stay=stay, alive=self._alive
        )

    def _proven(self, graph: ChannelGraph) -> Step:
        """Compact, hold the result against the masked model, and put back what is wrong."""
        inputs = random_like(self.dummy_input)
        faint = FaintWeights(self.bound_model, self._masks)
        step: Step | None = None
        try:
            with self._timed("proof"), masks_in_force(self.bound_model, self._masks, graph):
                expected = outputs_of(self.bound_model, inputs)
            step = self._compact(graph)
            with self._timed("proof"):
                drawn = Proof(self.bound_model, self._masks, self.report, self._compact).hold(step, inputs, expected)
        except BaseException:
            if step is not None:
                step.undo()
            faint.put_back()
            raise
        if faint.filled and not step.constants and step.replacement is None:
            faint.put_back(step.compaction.plan)
        elif faint.filled:  # what was folded came from weights that are not the model's
            step.undo()
            faint.put_back()
            step = self._compact(step.compaction.plan.graph)
        if drawn:
            self.report.inexact.append(
                "not proved: the forward draws random numbers, and other ones when it is smaller"
            )
        return step

    def _compact(self, graph: ChannelGraph) -> Step:
        """Infer what goes, replay that until it is clean, and remove it."""
        stay: list[Array] = []
        while True:
            graph, plan, inference = self._settled(graph, stay)
            masks = self._masks if inference.folds else {}
            with self._timed("masks"), masks_in_force(self.bound_model, masks, graph):
                constants, uneven = fold.measure(self.bound_model, self.dummy_input, plan, inference.folds)
            if uneven:
                stay += uneven
                continue
            replacement = self._run_replacers(plan)
            if replacement is not None:
                try:
                    after, plan, _ = self._settled(graph, stay, skip=replacement.names)
                except BaseException:
                    replacement.undo()
                    raise
                if after is not graph:  # with what was replaced, something more must stay
                    replacement.undo()
                    graph = after
                    continue
            self.report.inexact = _inexact(plan, constants)
            self._note_stayed(inference.stayed(plan), plan)
            del inference
            self._alive = {}  # a quarter of the masks' size, at the moment when memory is needed
            with self._timed("removal"):
                skip = replacement.names if replacement else ()
                compaction = Compaction(self.bound_model, plan, skip, self._masks)
                step = Step(self.bound_model, compaction, constants, fold.Applied([], []), replacement)
                try:
                    compaction.apply()
                    step.folded = fold.apply(self.bound_model, constants)
                except BaseException:
                    step.undo()
                    raise
            return step

    def _settled(
        self, graph: ChannelGraph, stay: list[Array], skip: Collection[str] = ()
    ) -> tuple[ChannelGraph, Plan, MaskInference]:
        """Return the graph, plan and inference by which a skeleton of the compact model runs as predicted."""
        made: list[MaskInference] = []

        def plan_of(graph: ChannelGraph) -> Plan:
            with self._timed("masks"):
                inference = self._inference(graph, stay)
                made.append(inference)
                return inference.plan()

        with self._timed("replay"):
            graph, plan = settled(
                graph,
                self.bound_model,
                self.dummy_input,
                plan_of,
                skip=skip,
                on_freeze=lambda mismatch: self._mismatches.append(mismatch),
            )
        return graph, plan, made[-1]

    def _note_stayed(self, lines: dict[str, str], plan: Plan) -> None:
        """Say what stays: what was put back because a forward holds its size, and what cannot go for other reasons."""
        self.report.stayed = []
        told: set[int] = set()
        for name, line in lines.items():
            cause = plan.graph.group(name).cause
            if cause is None or cause.why != FIXED:
                self.report.stayed.append(line)
                continue
            met = [m for m in self._mismatches if m.operator is not None
                   and (m.module, m.operator.name) == (cause.module, cause.operator)]  # fmt: skip
            told.update(map(id, met))
            self.report.put_back.append(f"{line}: {met[0].why}" if met else line)
        for name, reason in plan.graph.staying.items():
            told.update(id(mismatch) for mismatch in self._mismatches if str(mismatch) in reason)
            self.report.put_back.append(f"block {name}: {reason}")
        self.report.put_back += [str(mismatch) for mismatch in self._mismatches if id(mismatch) not in told]
        self.report.put_back = list(dict.fromkeys(self.report.put_back))

    def _run_replacers(self, plan: Plan) -> Replacement | None:
        if not self.replacers:
            return None
        self.node_infos = build_nodes(plan, self.bound_model, self._masks)
        replacement = Replacement(self.bound_model)
        try:
            with torch.no_grad():
                for replacer in self.replacers:
                    replacer.replace_modules(self)
        except BaseException:
            replacement.undo()
            raise
        replacement.look()
        return replacement

    def _fill_report(self, graph: ChannelGraph, before: Any) -> None:
        assert self.plan is not None
        after, report = self.plan.cost(), self.report
        report.macs_before, report.params_before = before.macs, before.params
        report.macs_after = after.macs
        report.params_after = sum(p.numel() for p in self.bound_model.parameters())
        report.removed = {name: (len(k), self.plan.graph.group(name).size) for name, k in self.plan.kept.items()}
        report.removed_blocks = list(self.plan.blocks)
        report.inexact += without_first_cache(self.bound_model)
        if self.latency is not None and _knows(self.latency, self.plan):
            report.latency_before_ms = self.latency.latency_ms()
            report.latency_after_ms = self.latency.latency_ms(self.plan.counts)
        report.frozen = [f"{f.size} channels: {f.reason} ({f.operator or 'unused'} in {f.module or 'the model'})"
                         for f in self.plan.graph.frozen]  # fmt: skip

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Count seconds for a step; a step inside another one stops the other's clock."""
        outer = self._step_timed
        self._start(step)
        try:
            yield
        finally:
            self._start(outer)

    def _start(self, step: str) -> None:
        now = time.perf_counter()
        if self._step_timed:
            seconds = self.report.seconds
            seconds[self._step_timed] = seconds.get(self._step_timed, 0.0) + now - self._since
        self._step_timed, self._since = step, now


def _rows(plan: Plan, group: ChannelGroup) -> int:
    """How many rows and columns a plan keeps where a group has its units."""
    places = [(m.name, m.dim) for m in (*group.producers, *group.consumers)]
    kept = [plan.dimensions(name).get(dim) for name, dim in places]
    return sum(plan.graph.shapes[n][d] if k is None else len(k) for (n, d), k in zip(places, kept, strict=True))


def _knows(table: LatencyTable, plan: Plan) -> bool:
    """Whether a table tells the latency of a plan: it has the same groups, and no block goes."""
    sizes = {group.name: group.size for group in table.graph.groups}
    return not plan.blocks and all(sizes.get(name) == plan.graph.group(name).size for name in plan.kept)


def _inexact(plan: Plan, constants: list[fold.FoldedBias]) -> list[str]:
    lines = [f"{name}: {plan.graph.group(name).reason}" for name in plan.kept if not plan.graph.group(name).exact]
    blocks = [plan.graph.block(name) for name in plan.blocks]
    lines += [f"block {block.name}: {block.reason}" for block in blocks if not block.exact]
    return lines + [f"{c.module}: {c.why}" for c in constants if not c.exact]
