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
    uniform = noise.clamp(_EDGE, 1 - _EDGE)
    concrete = torch.sigmoid((uniform.logit() + log_alpha) / BETA)
    stretched = concrete * (HIGH - LOW) + LOW
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0.0, 1.0), inside * concrete * (1 - concrete) * ((HIGH - LOW) / BETA)


class HardConcrete:
    """Gates in one vector, drawn anew after each optimizer step.

    What a step's forward passes multiply by is a leaf, so that several of them, in whatever order with the backward
    passes, share one draw, and the gradient of all arrives in one place.

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
        Float32 [count + 1], requires grad: the present draw, and a 1 for whatever has no gate.
    """

    def __init__(self, count: int, generator: torch.Generator, start: float = START):
        self.generator = generator
        self.log_alpha = torch.empty(count).normal_(start, 0.01, generator=generator)
        self.values = torch.ones(count + 1, requires_grad=True)
        self._slope = torch.zeros(count)
        self._settled: Tensor | None = None
        self.draw()

    def __deepcopy__(self, memo: dict[int, Any]) -> HardConcrete:
        return self  # an average of the weights (EMA) runs under the gates as they are now

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the gates; the gradient begins at nothing."""
        noise = torch.rand(len(self.log_alpha), generator=self.generator).to(self.log_alpha.device)
        values, self._slope = drawn(self.log_alpha, noise)
        self.values.grad = None
        self.values[:-1] = values
        self._settled = None

    def gradient(self) -> Tensor | None:
        """The loss's gradient by log α, or None where no backward pass has reached the gates."""
        return None if self.values.grad is None else self.values.grad[:-1] * self._slope

    def settled(self) -> Tensor:
        """The gates at test time and the final 1, float32 [count + 1]."""
        if self._settled is None:
            self._settled = torch.cat([settled(self.log_alpha), self.log_alpha.new_ones(1)])
        return self._settled

    def move(self, device: torch.device) -> None:
        """Go to where the weights are."""
        if self.log_alpha.device != device:
            self.log_alpha.data, self._slope = self.log_alpha.data.to(device), self._slope.to(device)
            gradient = self.values.grad
            self.values = self.values.detach().to(device).requires_grad_()
            self.values.grad = None if gradient is None else gradient.to(device)
            self._settled = None

    def state_dict(self) -> dict[str, Tensor]:
        """log α, the present draw and its derivative."""
        return {"log_alpha": self.log_alpha, "values": self.values.detach(), "slope": self._slope}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        for mine, name in ((self.log_alpha, "log_alpha"), (self.values, "values"), (self._slope, "slope")):
            mine.copy_(state[name])
        self.values.grad, self._settled = None, None


class Gating:
    """What multiplies one parameter: gates along some of its dimensions.

    Parameters
    ----------
    gates : HardConcrete
        The gates.
    dims : sequence of (int, torch.Tensor)
        A dimension, and for each index along it the place of its gate in ``gates.values``.
    """

    def __init__(self, gates: HardConcrete, dims: Sequence[tuple[int, Tensor]]):
        self.gates, self.dims = gates, list(dims)

    def __call__(self, value: Tensor, training: bool) -> Tensor:
        """Multiply by the draw in training, by the gates of test time otherwise."""
        if self.gates.log_alpha.device != value.device:
            self.gates.move(value.device)
        gates = self.gates.values if training else self.gates.settled()
        for dim, places in self.dims:
            if places.device != value.device:
                self.dims = [(d, p.to(value.device)) for d, p in self.dims]
                return self(value, training)
            along = gates.index_select(0, places).to(value.dtype)
            value = value * along.view([-1 if d == dim else 1 for d in range(value.dim())])
        return value


def gated_mul(target: Tensor, target_space: Any) -> Tensor:
    """NNI's ``mul``, and the gates of a target space that has them."""
    masked = mul_mask(target, target_space)
    gating: Gating | None = getattr(target_space, "gating", None)
    return masked if gating is None else gating(masked, target_space._wrapper.module.training)


pruning_apply_methods["gated_mul"] = gated_mul
