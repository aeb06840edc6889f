"""What the textual options of each method may be, where neither torch nor NNI is at hand to ask it.

A recipe is read without them; that these tables agree with the methods is tested.
"""

from __future__ import annotations

Choices = dict[str, tuple[str | None, ...]]
_GROUPS: Choices = {"normalise": ("default", "mean", "l2", "max", "cost", None)}
_WEIGHTS: Choices = {"normalise": (None, "mean", "l2", "max"), "density": (None, "uniform", "erk", "global")}

CHOICES: dict[str, Choices] = {
    "block": {"score": ("influence", "taylor", "loss")},
    "dynamic_sparse": {
        **_WEIGHTS,
        "method": ("set", "rigl", "itop"),
        "growth": (None, "gradient", "random"),
        "start": ("magnitude", "random"),
    },
    "hybrid": _GROUPS,
    "l0": _GROUPS,
    "lottery_ticket": {"by": ("weights", "groups"), "rewind": ("weights", "learning_rate", None)},
    "magnitude": _GROUPS,
    "random": _GROUPS,
    "synaptic": {"normalise": ("row", "layer", None)},
    "taylor": {**_GROUPS, "variant": ("weight", "gate", "activation")},
    "weight_gradient": _WEIGHTS,
    "weight_magnitude": _WEIGHTS,
}
"""By name in ``PRUNERS`` and option; an option that takes more than one of a few texts is not listed."""
