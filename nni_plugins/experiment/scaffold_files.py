"""The texts that ``nni-plugins new`` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from nni_plugins.experiment.scaffold import Made, Wanted

NOTES = {
    "folder": "where module:function and relative paths start, seen from this folder",
    "model": "what is compressed; checkpoint: trained weights, without them it is trained first",
    "data": "what it is trained on, and judged by",
    "train": "of the dense model; threads: 1, since several trials run at a time",
    "prune": "so much of the MACs goes; the search says where",
    "finetune": "after pruning",
    "objective": "on the validation split",
}


def recipe_text(tree: dict[str, Any], model: str) -> str:
    """Return a recipe with a comment above each section."""
    lines = [f"# One compression of {model}. The tuner's values replace fields of it by dotted path (space.yml)."]
    for name, value in tree.items():
        if name in NOTES:
            lines.append(f"# {NOTES[name]}")
        lines.append(yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=False).rstrip())
    return "\n".join(lines) + "\n"


def space_header(model: str, groups: int) -> str:
    """Return the comment at the head of a search space."""
    return (
        f"What is searched for {model}: the share that each part loses, of its {groups} channel groups.\n"
        "The shares are scaled together until prune.sparsity of the MACs is gone, so that every trial meets the budget."
    )


def readme_text(wanted: Wanted, made: Made, remote: bool) -> str:
    """Return the README of an experiment."""
    name = wanted.folder
    machines = (
        f"    nni-plugins run {name}/config.remote.yml           # on the machines in it: set pythonPath first\n"
        if remote
        else ""
    )
    stub = ""
    if wanted.data == "random":
        stub = "\nThe data are random and teach nothing: name your own by `data.name` in `recipe.yml`.\n"
    return f"""# {wanted.folder.name}

A search for a smaller `{wanted.model}` with {100 * wanted.macs:.0f}% of its MACs. Dense: {made.macs:,} MACs,
{made.params:,} parameters.

    nni-plugins run {name}                              # search, then report and take the best model
{machines}    nni-plugins compress {name}/recipe.yml              # one compression, without a search
    nni-plugins inspect {name}/recipe.yml               # what can go, what it costs, what is frozen
{stub}
- `recipe.yml`: the model, its data, how it is trained, pruned and fine-tuned.
- `space.yml`: what the tuner may change, {len(made.fields)} fields; {made.groups} channel groups can lose units.
- `config.yml`: {wanted.trials} trials by {wanted.tuner}, {wanted.concurrency} at a time.

`prune.sparsity` in `recipe.yml` says how much of the MACs goes; at least {100 * made.least_macs:.2g}% of them stay.
"""
