"""Hard concrete gates: random variables that are exactly 0, exactly 1, or between, and can be trained.

Louizos, Welling and Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, with the
constants of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from nni.compression.base.apply_method import mul_mask, pruning_apply_methods
from torch import Tensor

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature of the concrete distribution, and the interval (γ, ζ) that it is stretched to."""
LIMIT = 4.605
"""log α is kept within ±LIMIT."""
START = 2.5
"""log α to begin with: open all the time at test time, and for 98 draws of 100 in training."""
_EDGE = 1e-6


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z ≠ 0) = σ(log α − β·log(−γ/ζ)), equation 12."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor) -> Tensor:
    """The gate at test time, clip(σ(log α)(ζ − γ) + γ, 0, 1), equation 13: zero where log α ≤ −2.398."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def drawn(log_alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The gate for uniform noise in (0, 1), equations 10 and 11, and its derivative by log α."""
    concrete = noise.logit(_EDGE).add_(log_alpha).div_(BETA).sigmoid_()
    stretched = concrete * (HIGH - LOW) + LOW
    values = stretched.clamp(0.0, 1.0)
    slope = torch.addcmul(concrete, concrete, concrete, value=-1).mul_((HIGH - LOW) / BETA)
    return values, slope.mul_(values == stretched)


class HardConcrete:
    """Gates in one vector, drawn anew after each optimizer step.

    What a step's forward passes multiply by are leaves, one for each place, so that several passes, in whatever order
    with the backward passes, share one draw; the gradients of all are gathered once, after the step.

    Parameters
    ----------
    count : int
        Number of gates.
    generator : torch.Generator
        Where noise comes from; it stays on the CPU.
    start : float
        log α to begin with; a little noise is added to it, as in the paper's code.

    Attributes
    ----------
    log_alpha : torch.Tensor
        Float32 [count].
    values : torch.Tensor
        Float32 [count + 1]: the present draw, and a 1 for whatever has no gate.
    leaves : list of torch.Tensor
        Float32, requires grad: the present draw as :meth:`spread` has asked for it.
    """

    def __init__(self, count: int, generator: torch.Generator, start: float = START):
        self.generator = generator
        self.log_alpha = torch.empty(count).normal_(start, 0.01, generator=generator)
        self.values = torch.ones(count + 1)
        self.leaves: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._places, self._flat = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        self._slope = torch.zeros(count)
        self._settled: Tensor | None = None
        self.draw()

    def __deepcopy__(self, memo: dict[int, Any]) -> HardConcrete:
        return self  # an average of the weights (EMA) runs under the gates as they are now

    def spread(self, places: Tensor, shape: Sequence[int]) -> int:
        """Lay gates out for a place that multiplies by them; return the index of its leaf.

        Parameters
        ----------
        places : torch.Tensor
            Int64: where in ``values`` each gate is.
        shape : sequence of int
            Of the leaf, such that it multiplies a parameter.
        """
        self._places = torch.cat([self._places, places.to(self._places.device).flatten()])
        self._shapes.append(tuple(shape))
        self._lay_out([None] * len(self._shapes))
        return len(self._shapes) - 1

    def _lay_out(self, gradients: Sequence[Tensor | None]) -> None:
        """Make the leaves: views of one vector, which a draw fills in one call."""
        self._flat = self.values.index_select(0, self._places)
        sizes = [torch.Size(shape).numel() for shape in self._shapes]
        parts = zip(self._flat.split(sizes), self._shapes, strict=True)
        self.leaves = [part.view(shape).detach().requires_grad_() for part, shape in parts]
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the gates; the gradient begins at nothing."""
        noise = torch.rand(len(self.log_alpha), generator=self.generator).to(self.log_alpha.device)
        values, self._slope = drawn(self.log_alpha, noise)
        self.values[:-1] = values
        self._refresh()

    def _refresh(self) -> None:
        torch.index_select(self.values, 0, self._places, out=self._flat)
        for leaf in self.leaves:
            leaf.grad = None
        self._settled = None

    def gradient(self) -> Tensor | None:
        """The loss's gradient by log α, or None where no backward pass has reached the gates."""
        found = [leaf.grad for leaf in self.leaves]
        if all(gradient is None for gradient in found):
            return None
        pairs = zip(found, self.leaves, strict=True)
        flat = torch.cat([torch.zeros_like(leaf).flatten() if g is None else g.flatten() for g, leaf in pairs])
        return torch.zeros_like(self.values).index_add_(0, self._places, flat)[:-1].mul_(self._slope)

    def settled(self) -> Tensor:
        """The gates at test time and the final 1, float32 [count + 1]."""
        if self._settled is None:
            self._settled = torch.cat([settled(self.log_alpha), self.log_alpha.new_ones(1)])
        return self._settled

    def move(self, device: torch.device) -> None:
        """Go to where the weights are."""
        if self.log_alpha.device != device:
            self.log_alpha.data, self._slope = self.log_alpha.data.to(device), self._slope.to(device)
            self.values, self._places = self.values.to(device), self._places.to(device)
            self._lay_out([None if leaf.grad is None else leaf.grad.to(device) for leaf in self.leaves])
            self._settled = None

    def state_dict(self) -> dict[str, Tensor]:
        """log α, the present draw and its derivative."""
        return {"log_alpha": self.log_alpha, "values": self.values, "slope": self._slope}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        for mine, name in ((self.log_alpha, "log_alpha"), (self.values, "values"), (self._slope, "slope")):
            mine.copy_(state[name])
        self._refresh()


class Gating:
    """What multiplies one parameter: gates along some of its dimensions.

    Parameters
    ----------
    gates : HardConcrete
        The gates.
    dims : sequence of (int, torch.Tensor)
        A dimension, and for each index along it the place of its gate in ``gates.values``.
    rank : int
        Dimensions of the parameter.
    """

    def __init__(self, gates: HardConcrete, dims: Sequence[tuple[int, Tensor]], rank: int):
        self.gates = gates
        shapes = [[-1 if d == dim else 1 for d in range(rank)] for dim, _ in dims]
        self._dims = [(places, shape) for (_, places), shape in zip(dims, shapes, strict=True)]
        self._leaves = [gates.spread(p, [len(p) if n < 0 else 1 for n in shape]) for p, shape in self._dims]

    def __call__(self, value: Tensor, training: bool) -> Tensor:
        """Multiply by the draw in training, by the gates of test time otherwise."""
        if self.gates.log_alpha.device != value.device:
            self.gates.move(value.device)
        if training:
            factors = [self.gates.leaves[index] for index in self._leaves]
        else:
            gates = self.gates.settled()
            factors = [gates.index_select(0, p.to(gates.device)).view(shape) for p, shape in self._dims]
        for factor in factors:
            value = value * factor.to(value.dtype)
        return value


def gated_mul(target: Tensor, target_space: Any) -> Tensor:
    """NNI's ``mul``, and the gates of a target space that has them."""
    masked = mul_mask(target, target_space)
    gating: Gating | None = getattr(target_space, "gating", None)
    return masked if gating is None else gating(masked, target_space._wrapper.module.training)


pruning_apply_methods["gated_mul"] = gated_mul
