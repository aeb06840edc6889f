"""The proof: the compact model's output held against the masked model's, on random input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.call import output_tensors
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.preserve import drop_caches, preserved, random_state_kept, set_mode
from nni_plugins.channels.watch import as_arguments, map_tensors, unfused_attention

#: Differences up to this share of the output's size are rounding, by the precision that the model computes in.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def random_like(dummy_input: Any, seed: int = 0) -> Any:
    """Return the dummy input with its floating tensors drawn anew; indices and masks stay, for their values matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return map_tensors(draw, dummy_input)


def outputs_of(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Return the floating tensors in the output of ``model`` in eval mode; the model is left as it was."""
    args, kwargs = as_arguments(inputs)
    with preserved(model), torch.no_grad(), unfused_attention():
        drop_caches(model)
        set_mode(model, False)
        out = model(*args, **kwargs)
    return [t.detach().clone() for t in output_tensors(out) if t.is_floating_point()]


def draws_random_numbers(model: nn.Module, inputs: Any) -> bool:
    """Whether two runs in eval mode on the same input, from different random states, give different outputs."""
    with random_state_kept():
        first = outputs_of(model, inputs)
        torch.rand(1)
        return largest_error(outputs_of(model, inputs), first)[0] > 0


def largest_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and it as a share of the largest absolute expected value.

    Shapes that differ, or values that are not finite in one only, count as infinitely wrong.
    """
    error, size = 0.0, 0.0
    if len(actual) != len(expected):
        return float("inf"), float("inf")
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("inf"), float("inf")
        if not e.numel():
            continue
        finite = torch.isfinite(e)
        if not bool((torch.isfinite(a) == finite).all()):
            return float("inf"), float("inf")
        a, e = a[finite].double(), e[finite].double()
        if e.numel():
            error = max(error, (a - e).abs().max().item())
            size = max(size, e.abs().max().item())
    return error, error / size if size else (0.0 if error == 0 else float("inf"))


def tolerance_of(model: nn.Module, outputs: Iterable[torch.Tensor] = ()) -> float:
    """Return the rounding to allow, as a share of the output's size; ``outputs`` tell of a forward that casts."""
    kinds = {p.dtype for p in (*model.parameters(), *outputs) if p.is_floating_point()}
    return max((TOLERANCE.get(kind, 1e-4) for kind in kinds), default=1e-4)


#: Weights all below this hide what they multiply: a head initialised to zero, a LayerScale of 1e-6.
FAINT = 1e-4


class FaintWeights:
    """Weights that are all (nearly) zero are filled for the proof, so that they cannot hide an error behind them.

    What is folded while they are filled is not what they leave behind.

    Attributes
    ----------
    filled
        ``{parameter name: what it held}``.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(model.named_parameters())
        self.filled: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self._parameters.items():
            if name.endswith("bias") or not parameter.is_floating_point() or parameter.is_meta:
                continue
            mask = masks.get(name)
            if parameter.numel() > 1 and _is_faint(parameter) and (mask is None or mask.any()):
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                self.filled[name] = parameter.data
                parameter.data = (noise if mask is None else noise * mask.to(noise)).to(parameter)

    def put_back(self, plan: Plan | None = None) -> None:
        """Give the weights back what they held; of the compact model of a plan, what of it is kept."""
        for name, data in self.filled.items():
            for dim, kept in (plan.dimensions(name) if plan is not None else {}).items():
                data = data.index_select(dim, torch.as_tensor(kept, device=data.device))
            self._parameters[name].data = data
        self.filled = {}


def _is_faint(parameter: torch.Tensor) -> bool:
    first = parameter.detach().flatten()[:64]  # most are not, and a look at the first few says so
    return bool(first.abs().amax() < FAINT) and bool(parameter.detach().abs().amax() < FAINT)
