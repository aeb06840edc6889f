"""Which step of a recipe may follow which: what each needs, and what it leaves. Checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nni_plugins.training.errors import RecipeError


@dataclass(frozen=True)
class Step:
    """A step of a compression.

    Attributes
    ----------
    needs
        States that earlier steps must have left, each with the step that leaves it and the reason.
    leaves
        The state that it leaves.
    ends
        States that must not be there any more when it runs, with the reason.
    """

    needs: dict[str, str]
    leaves: str
    ends: dict[str, str]


QUANTIZED = "scales are taken of what is there then; whatever changes weights comes before"
STEPS: dict[str, Step] = {
    "prune": Step(
        needs={},
        leaves="masks",
        ends={
            "quantized": "scales are taken of what pruning leaves, so that prune comes before quantize",
            "compact": "what is removed once is gone; prune comes before speedup",
        },
    ),
    "finetune": Step(
        needs={"masks": "fine-tuning mends what pruning took away, so that it comes after prune"},
        leaves="finetuned",
        ends={"quantized": f"fine-tuning would leave the scales behind: {QUANTIZED}"},
    ),
    "speedup": Step(
        needs={"masks": "speedup takes out what prune masks"},
        leaves="compact",
        ends={"quantized": f"a smaller model has other ranges: {QUANTIZED}"},
    ),
    "quantize": Step(
        needs={
            "masks": "what pruning does to the ranges is not known before it",
            "compact": "ranges are taken of the compact model, whose norms can be folded",
        },
        leaves="quantized",
        ends={},
    ),
    "export": Step(needs={"compact": "what is exported is the compact model"}, leaves="exported", ends={}),
}
"""By name, in the usual order."""
USUAL = tuple(STEPS)
NEEDED = ("prune", "speedup")
_MAKER = {step.leaves: name for name, step in STEPS.items()}


def check_order(steps: Sequence[str], wanted: Sequence[str] = ()) -> None:
    """Refuse an order that cannot work.

    Parameters
    ----------
    steps
        Names, in order.
    wanted
        Steps that other sections ask for (``quantize.method: qat``).

    Raises
    ------
    RecipeError
        In one line: the step, what it misses or what comes too late, and why.
    """
    listed = ", ".join(steps)
    for name in steps:
        if name not in STEPS:
            raise RecipeError(f"steps: {name} is no step; known: {', '.join(STEPS)}")
    for name in steps:
        if list(steps).count(name) > 1:
            raise RecipeError(f"steps: {name} stands there twice ({listed}); once is all that it can do")
    states: list[str] = []
    for name in steps:
        step = STEPS[name]
        for state, why in step.ends.items():
            if state in states:
                raise RecipeError(f"steps: {name} comes after {_MAKER[state]} ({listed}); {why}")
        for state, why in step.needs.items():
            if state not in states:
                raise RecipeError(f"steps: {name} comes before {_MAKER[state]} ({listed}); {why}")
        states.append(step.leaves)
    for name in NEEDED:
        if name not in steps:
            raise RecipeError(f"steps: {name} is missing ({listed}); the result of a recipe is a compact model")
    for name in wanted:
        if name not in steps:
            raise RecipeError(f"steps: {name} is missing ({listed}), and the section {name} asks for it")
    if {"quantize", "export"} <= set(wanted) and steps.index("export") < steps.index("quantize"):
        raise RecipeError(f"steps: export comes before quantize ({listed}); the files would not be quantised")
