"""Random scores: the control that every criterion must beat. Asks nothing of training."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from nni_plugins.pruners.base import GroupPruner


class RandomPruner(GroupPruner):
    """Remove units at random.

    Each group draws from its own generator, seeded by ``seed`` and the group's name: what one group draws does
    not depend on which others are pruned, or on the device.

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
    seed : int
        Same seed, same masks.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`.
    """

    default_normalise = None

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        seed: int = 0,
        **kwargs: Any,
    ):
        self.seed = seed
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)

    def _scores(self) -> dict[str, Tensor]:
        scores = {}
        for group in self.groups:
            draw = np.random.default_rng([self.seed, crc32(group.name.encode())])
            scores[group.name] = torch.from_numpy(draw.random(group.size))
        return scores
