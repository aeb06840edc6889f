"""One removal that can be taken back: what was sliced, folded and replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nni_plugins.speedup import fold
from nni_plugins.speedup.compact import Compaction
from nni_plugins.speedup.replacement import Replacement


@dataclass
class Step:
    """One removal, the constants that it leaves behind, and what was folded of them."""

    model: nn.Module
    compaction: Compaction
    constants: list[fold.FoldedBias]
    folded: fold.Applied
    replacement: Replacement | None = None

    def undo(self) -> None:
        fold.remove(self.model, self.folded)
        self.compaction.undo()
        if self.replacement is not None:
            self.replacement.undo()

    def become(self, other: Step) -> None:
        self.compaction, self.constants, self.folded = other.compaction, other.constants, other.folded
        self.replacement = other.replacement
