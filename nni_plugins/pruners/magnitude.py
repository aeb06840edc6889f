"""Magnitude: a unit matters as much as its weights are large.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (L1 norm of filters), extended to groups as in
Fang et al., DepGraph, CVPR 2023: the norm runs over all that goes with the unit. Asks nothing of training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nni_plugins.pruners.base import GroupPruner
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.score import group_sums


class MagnitudePruner(GroupPruner):
    """Remove the units whose weights are smallest.

    The score of a unit is the L1 or L2 norm of its weights: producers' rows, norms' scales and consumers'
    slices. Biases and norms' shifts do not count.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's.
    evaluator : nni Evaluator, optional
        Needed for a schedule of several times only.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    norm : {'l1', 'l2'}
        Which norm.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`.

    Examples
    --------
    >>> pruner = MagnitudePruner(model, [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}], dummy_input=x)
    >>> model, masks = pruner.compress()
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        norm: str = "l1",
        **kwargs: Any,
    ):
        if norm not in ("l1", "l2"):
            raise PruningError(f"norm is {norm!r}; it must be 'l1' or 'l2'")
        self.norm = norm
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)

    def _scores(self) -> dict[str, Tensor]:
        measure = Tensor.abs if self.norm == "l1" else Tensor.square
        values = {name: measure(p.detach()) for name, p in self.parameters.items() if not name.endswith("bias")}
        scores = {}
        for group in self.groups:
            total = group_sums(group, values)
            if total is None:
                raise PruningError(f"{group.name}: no weight belongs to its units, so they have no magnitude")
            scores[group.name] = total if self.norm == "l1" else total.sqrt()
        return scores
