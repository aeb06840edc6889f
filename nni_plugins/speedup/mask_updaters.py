"""Mask inference for NNI's own ``ModelSpeedup``, read from the channel graph in place of random tensors.

NNI runs each operator on random tensors and calls what does not vary masked. It cannot see across modules that return
tuples, through attention heads, or into modules that torch keeps closed (``nn.TransformerEncoderLayer``), and it lets
masks that disagree (the halves of a GLU, the channels of a residual sum) through to modules that then do not fit.
``ModelSpeedup(model, x, masks, customized_replacers=REPLACERS, customized_mask_updaters=MASK_UPDATERS)`` takes every
mask from one plan, which cannot disagree with itself.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nni.compression.speedup.mask_updater import MaskUpdater
from nni.compression.speedup.replacement import replace_module
from nni.compression.speedup.replacer import Replacer
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from nni_plugins.channels.call import ModuleCall
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array
from nni_plugins.channels.plan import Plan, mask_of
from nni_plugins.channels.rehearse import settled
from nni_plugins.speedup import fold
from nni_plugins.speedup.activations import with_activations
from nni_plugins.speedup.compact import Compaction
from nni_plugins.speedup.infer import MaskInference
from nni_plugins.speedup.masks import activation_masks, bake, parameter_masks, unbake
from nni_plugins.speedup.nodes import activation_mask
from nni_plugins.speedup.replacers import TypeReplacer, is_nnis

_logger = logging.getLogger(__name__)


@dataclass
class _Found:
    """What one speedup removes, and the constants that it leaves behind."""

    plan: Plan
    constants: list[fold.FoldedBias]


class GraphMaskUpdater(MaskUpdater):
    """Gives every node of NNI's graph the masks of one plan, inferred from the channel graph.

    It also takes out what NNI has no replacer for (see :class:`PlanReplacer`), and folds constants that masked channels
    leave behind into biases, which NNI drops. A model that cannot be watched is left to NNI's own inference.

    Raises
    ------
    ValueError
        In one line, from the speedup, if the masks do not fit the model.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Any, _Found | None] = WeakKeyDictionary()

    def detect(self, model_speedup: Any, node: Node) -> bool:
        """Infer everything at the first node of a speedup; all nodes are then this updater's, or none is."""
        if model_speedup not in self._found:
            self._found[model_speedup] = found = _infer(model_speedup)
            if found is not None:
                given = [replacer for replacer in model_speedup.replacers if not is_nnis(replacer)]
                last = TypeReplacer(replace_module)
                model_speedup.replacers = [*given, PlanReplacer(found.plan, found.constants, last), last]
                _fill_nodes(model_speedup, found.plan)
        return self._found[model_speedup] is not None

    def direct_update_preprocess(self, model_speedup: Any, node: Node) -> None:
        """Note the node's module: had it been known before, NNI would have multiplied masks of activations in again."""
        if node.op == "call_module":
            model_speedup.node_infos[node].module = model_speedup.fetch_attr(node.target)

    def direct_update_process(self, model_speedup: Any, node: Node) -> None:
        """Nothing is left to do: masks are known from the plan."""

    direct_update_postprocess = direct_update_process
    indirect_update_preprocess = indirect_update_process = indirect_update_postprocess = direct_update_process


class PlanReplacer(Replacer):
    """Takes out, in place, what no other replacer does: closed modules, bare parameters, attributes that count.

    Modules that replacers before it have done are left as they are, and those that ``last`` will do are left to it.
    """

    def __init__(self, plan: Plan, constants: list[fold.FoldedBias], last: TypeReplacer) -> None:
        self._plan = plan
        self._constants = constants
        self._last = last

    def replace_modules(self, speedup: Any) -> None:
        model: nn.Module = speedup.bound_model
        modules = dict(model.named_modules())
        called = [node for node in speedup.node_infos if node.op == "call_module"]
        done = {node.target for node in called if speedup.node_infos[node].replaced}
        coming = {node.target for node in called if self._last.takes(node, modules[node.target])} - done
        for item in self._constants:
            if item.module in coming:
                _add_to_full_bias(modules[item.module], item, self._plan)
        apart = {name for name in modules if any(f"{name}.".startswith(f"{target}.") for target in done | coming)}
        Compaction(model, self._plan, skip=apart).apply()
        fold.apply(model, [item for item in self._constants if item.module not in coming])
        for node in called:
            if node.target not in coming:
                speedup.node_infos[node].replaced = True


def _add_to_full_bias(module: Any, item: fold.FoldedBias, plan: Plan) -> None:
    """Add a folded constant to a bias that is still to be sliced, making it where there is none."""
    rows = plan.dimensions(f"{item.module}.weight" if item.module else "weight").get(0)
    full = torch.zeros(module.weight.shape[0], dtype=module.weight.dtype, device=module.weight.device)
    full[slice(None) if rows is None else torch.as_tensor(rows, device=full.device)] = item.delta.to(full)
    if module.bias is None:
        module.bias = nn.Parameter(full, requires_grad=module.weight.requires_grad)
    else:
        module.bias.data.add_(full)


def _infer(speedup: Any) -> _Found | None:
    model, inputs = speedup.bound_model, speedup.dummy_input
    masks, activations = parameter_masks(model, speedup.masks), activation_masks(model, speedup.masks)
    try:
        graph = ChannelGraph.watch(model, inputs)
    except Exception as error:
        _logger.warning("the model cannot be watched, so NNI infers the masks: %s", str(error).splitlines()[0])
        return None
    masks = with_activations(graph, model, inputs, masks, activations)
    before = bake(model, masks)
    stay: list[Array] = []
    made: list[MaskInference] = []

    def plan_of(graph: ChannelGraph) -> Plan:
        made.append(MaskInference(graph, model, masks, exact_only=False, stay=stay))
        return made[-1].plan()

    try:
        while True:
            graph, plan = settled(graph, model, inputs, plan_of)
            constants, uneven = fold.measure(model, inputs, plan, made[-1].folds)
            if not uneven:
                return _Found(plan, constants)
            stay += uneven
    finally:
        unbake(model, before)


def _fill_nodes(speedup: Any, plan: Plan) -> None:
    """Give NNI's nodes the masks that its replacement functions read."""
    calls: dict[str, Iterator[ModuleCall]] = {
        name: iter(found) for name, found in _by_module(plan.graph.trace.calls).items()
    }
    modules = dict(speedup.bound_model.named_modules())
    for node, info in speedup.node_infos.items():
        if node.op != "call_module":
            continue
        module = modules[node.target]
        info.param_masks = {
            name: mask_of(parameter, plan.dimensions(f"{node.target}.{name}"))
            for name, parameter in module.named_parameters()
        }
        call = next(calls.get(node.target, iter(())), None)
        if call is None:
            continue
        if len(call.outputs) == 1 and isinstance(info.output_origin, torch.Tensor):
            info.output_masks = activation_mask(plan, call.outputs[0], info.output_origin.device)
        given = [arg for arg in tree_flatten(node.args)[0] if isinstance(arg, Node)]
        made = [arg for arg in given if isinstance(speedup.node_infos[arg].output_origin, torch.Tensor)]
        if len(made) == len(call.inputs):
            for arg, value in zip(made, call.inputs, strict=True):
                before = speedup.node_infos[arg]
                before.output_masks = activation_mask(plan, value, before.output_origin.device)


def _by_module(calls: list[ModuleCall]) -> dict[str, list[ModuleCall]]:
    found: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in calls:
        found[call.module].append(call)
    return found


#: For ``customized_mask_updaters``.
MASK_UPDATERS: list[MaskUpdater] = [GraphMaskUpdater()]
