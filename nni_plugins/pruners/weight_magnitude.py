"""Magnitude of single weights: the smallest go. Han et al., Learning both Weights and Connections, NeurIPS 2015."""

from __future__ import annotations

from torch import Tensor

from nni_plugins.pruners.weights import WeightPruner


class MagnitudeWeightPruner(WeightPruner):
    """Mask the weights of smallest absolute value. Asks nothing of training.

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
    dummy_input, scope, density, pattern, normalise, schedule
        Those of :class:`~nni_plugins.pruners.weights.WeightPruner`.

    Examples
    --------
    >>> pruner = MagnitudeWeightPruner(model, [{'op_types': ['Linear'], 'sparse_ratio': 0.9}], density='erk')
    >>> model, masks = pruner.compress()
    """

    def _scores(self) -> dict[str, Tensor]:
        return {name: weight.detach().abs() for name, weight in self.parameters.items()}
