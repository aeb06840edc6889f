"""``ModelSpeedup`` dies of a mask for a group norm: it flattens every mask from dimension 1 on, and this has none."""

from __future__ import annotations

import functools
from typing import Any

from nni_plugins.compat.hook import Patch


def _is_vector(targets: Any) -> bool:
    weight = targets.get("weight")
    return weight is not None and weight.dim() < 2


def _defect(module: Any) -> bool:
    torch = module.torch
    graph = torch.fx.Graph()
    root = torch.nn.Module()
    root.norm = torch.nn.GroupNorm(2, 4)
    graph.output(graph.call_module("norm", (graph.placeholder("x"),)))
    try:
        module.fix_group_mask_conflict(torch.fx.GraphModule(root, graph), {"norm": {"weight": torch.ones(4)}})
    except IndexError:
        return True
    return False


def _mend(module: Any) -> None:
    fix = module.fix_group_mask_conflict

    @functools.wraps(fix)
    def fix_group_mask_conflict(graph_module: Any, masks: Any) -> Any:
        fix(graph_module, {name: targets for name, targets in masks.items() if not _is_vector(targets)})
        return masks  # each module's own masks are fixed in place

    module.fix_group_mask_conflict = fix_group_mask_conflict


PATCH = Patch(
    name="norm-masks",
    module="nni.compression.speedup.model_speedup",
    mends="ModelSpeedup fails with 'Dimension out of range' where a group norm has a mask",
    defect=_defect,
    mend=_mend,
)
