"""A budget as a term of the loss: Lagrange multipliers that grow until the expected cost is what was asked.

Wang, Wohlwend and Lei, Structured Pruning of Large Language Models, EMNLP 2020, section 3.3: for an expected cost
ŝ and a target t the term is λ₁(ŝ − t) + λ₂(ŝ − t)²; the multipliers climb while the weights descend, and t moves
from the dense cost to the asked one in the first steps. The multipliers climb by their gradient itself, so the
further off the faster; Adam, whose steps are all of one size, missed the budget by up to 0.2 of the dense cost on
digits in 200 steps, and this by 0.02.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

_RISE = (400.0, 4000.0)  # how far λ₁ and λ₂ climb in a whole training, for each unit of their gradients
_FIRST = 60.0  # of λ₂: what holds the cost near the target before λ₁ has found its value
_REFRESH = 10  # steps between two readings of the true cost; between them it is taken as linear


class Lagrangian:
    """Constraints on the cost of a model whose units are there with some probability.

    Parameters
    ----------
    cost : callable
        From the number of units kept of each group to float [constraints], each 1 for the dense model. Any function
        will do (MACs, a latency table): it is read at whole numbers of units and made linear in between.
    sizes : mapping of str to int
        Units of each group, in the order in which ``probability`` lists them.
    asked : numpy.ndarray
        Float [constraints]: the costs to arrive at.
    warmup_steps : int
        Steps in which the target goes from the dense cost to the asked one.
    total_steps : int
        Steps of the whole training, by which the multipliers pace themselves.
    rate : float
        How fast the multipliers climb: 1 is as tried.

    Attributes
    ----------
    multipliers : torch.Tensor
        Float32 [2, constraints]: λ₁ and λ₂.
    """

    def __init__(
        self,
        cost: Callable[[Mapping[str, int]], np.ndarray],
        sizes: Mapping[str, int],
        asked: np.ndarray,
        warmup_steps: int,
        total_steps: int,
        rate: float = 1.0,
    ):
        self._rise = torch.tensor(_RISE)[:, None] * (rate / total_steps)
        self._cost, self._sizes, self._warmup = cost, dict(sizes), max(warmup_steps, 1)
        self._asked = torch.as_tensor(np.asarray(asked), dtype=torch.float32)
        self._group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(self._sizes.values())))
        self.multipliers = torch.tensor([0.0, _FIRST])[:, None].repeat(1, len(self._asked))
        self._start = torch.ones(len(self._asked))
        self._offset = torch.zeros(len(self._asked))
        self._slope = torch.zeros(len(self._asked), len(sizes))
        self._per_unit: Tensor | None = None

    def begin(self, probability: Tensor) -> None:
        """Take the present cost as the one to start from."""
        self.read(probability)
        self._start = self.expected(probability)

    def read(self, probability: Tensor) -> None:
        """Read the true cost around the expected number of units of each group."""
        expected = np.bincount(self._group.cpu(), probability.double().cpu(), len(self._sizes))
        names, sizes = list(self._sizes), np.array(list(self._sizes.values()))
        # a group keeps at least one unit; a step of a sixteenth smooths costs that move in jumps
        whole = np.clip(np.rint(expected), 1, sizes).astype(int)
        step = np.maximum(sizes // 16, 1)
        low, high = np.maximum(whole - step, 1), np.minimum(whole + step, sizes)
        kept = dict(zip(names, whole.tolist(), strict=True))
        slope = np.zeros(self._slope.shape)
        for index, name in enumerate(names):
            if high[index] > low[index]:
                ends = [self._cost({**kept, name: int(end[index])}) for end in (high, low)]
                slope[:, index] = (ends[0] - ends[1]) / (high[index] - low[index])
        offset = self._cost(kept) - slope @ whole
        self._slope = torch.as_tensor(slope, dtype=torch.float32, device=self.multipliers.device)
        self._offset = torch.as_tensor(offset, dtype=torch.float32, device=self.multipliers.device)
        self._per_unit = None

    @property
    def per_unit(self) -> Tensor:
        """Float32 [constraints, units]: what each unit costs, as last read."""
        if self._per_unit is None:
            self._per_unit = self._slope[:, self._group]
        return self._per_unit

    def expected(self, probability: Tensor) -> Tensor:
        """Float32 [constraints]: the expected costs, for units kept with these probabilities."""
        return torch.addmv(self._offset, self.per_unit, probability)

    def push(self, probability: Tensor, step: int) -> Tensor:
        """The term's gradient by the probabilities at optimizer step ``step`` (from 1); the multipliers climb."""
        if step % _REFRESH == 1:
            self.read(probability)
        progress = min(step / self._warmup, 1.0)
        target = self._asked if progress == 1 else torch.lerp(self._start, self._asked, progress)
        excess = self.expected(probability) - target
        weight = torch.addcmul(self.multipliers[0], self.multipliers[1], excess, value=2)
        self.multipliers.addcmul_(self._rise, torch.stack([excess, excess**2]))
        return weight @ self.per_unit

    def move(self, device: torch.device) -> None:
        """Go to where the gates are."""
        if self.multipliers.device != device:
            for name in ("multipliers", "_rise", "_asked", "_group", "_start", "_offset", "_slope"):
                setattr(self, name, getattr(self, name).to(device))
            self._per_unit = None

    def state_dict(self) -> dict[str, Tensor]:
        """The multipliers, and the cost as last read."""
        return {
            "multipliers": self.multipliers, "start": self._start, "offset": self._offset, "slope": self._slope
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.multipliers.copy_(state["multipliers"])
        where = self.multipliers.device
        self._start, self._offset, self._slope = (state[name].to(where) for name in ("start", "offset", "slope"))
        self._per_unit = None
