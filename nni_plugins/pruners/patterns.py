"""N:M patterns: of every M weights in a row along the input, at most N are kept.

The row is that of the matrix product which hardware runs: a linear layer's ``[out, in]``, and a convolution's
``[out, k·in]`` with the input channels last, so that M consecutive *input channels* at one place of the kernel make a
block (Mishra et al., Accelerating Sparse Deep Neural Networks, 2021; NVIDIA's ASP). Where the input channels of a group
are not a multiple of M, the last block is filled up with zeros: of what is left, at most N are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_plugins.pruners.errors import PruningError


def input_layout(module: nn.Module) -> tuple[int, int]:
    """Dimension of a module's weight along which its inputs lie, and the number of groups that share that dimension."""
    if getattr(module, "transposed", False):
        return 0, int(getattr(module, "groups", 1))
    return 1, 1


@dataclass(frozen=True)
class Pattern:
    """N of M.

    Parameters
    ----------
    n, m : int
        At most ``n`` of every ``m`` weights are kept.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PruningError(f"pattern is {self.n}:{self.m}; it must keep at least 1 and not all, as '2:4'")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction that is kept where the input is a multiple of M."""
        return self.n / self.m

    def blocks(self, values: Tensor, dim: int = 1, groups: int = 1, *, fill: float = 0.0) -> Tensor:
        """Return values [blocks, m], each row a block; what fills up the last blocks has the value ``fill``."""
        if values.dim() < 2:
            raise PruningError(f"a weight of shape {list(values.shape)} has no input dimension for the pattern {self}")
        rows = self._rows(values, dim, groups)
        short = -rows.shape[-1] % self.m
        return functional.pad(rows, (0, short), value=fill).reshape(-1, self.m)

    def _rows(self, values: Tensor, dim: int, groups: int) -> Tensor:
        return values.unflatten(dim, (groups, -1)).movedim(dim + 1, -1)

    def restore(self, blocks: Tensor, like: Tensor, dim: int = 1, groups: int = 1) -> Tensor:
        """Put blocks [blocks, m] back into the shape of the weight that they came from."""
        rows = self._rows(like, dim, groups)
        padded = (rows.shape[-1] + self.m - 1) // self.m * self.m
        values = blocks.reshape(*rows.shape[:-1], padded)[..., : rows.shape[-1]]
        return values.movedim(-1, dim + 1).flatten(dim, dim + 1).contiguous()

    def mask(self, scores: Tensor, dim: int = 1, groups: int = 1) -> Tensor:
        """Keep the ``n`` highest scores of every block: bool, of the scores' shape; of equal ones the first."""
        blocks = self.blocks(scores, dim, groups, fill=-torch.inf)
        order = blocks.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order, True)
        return self.restore(kept, scores, dim, groups)

    def holds(self, mask: Tensor, dim: int = 1, groups: int = 1) -> bool:
        """Say whether no block of a mask, or of a weight, has more than ``n`` entries that are not zero."""
        return bool((self.blocks((mask != 0).to(torch.int32), dim, groups).sum(dim=1) <= self.n).all())


def as_pattern(pattern: Pattern | str | None) -> Pattern | None:
    """A pattern from itself or from text such as ``'2:4'``."""
    if pattern is None or isinstance(pattern, Pattern):
        return pattern
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern) if isinstance(pattern, str) else None
    if found is None:
        raise PruningError(f"pattern is {pattern!r}; it must be N:M, such as '2:4'")
    return Pattern(int(found[1]), int(found[2]))
