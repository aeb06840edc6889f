"""The page of the zoo's results, from files of JSON lines.

python -m benchmarks.zoo.table outputs/zoo/*.jsonl > docs/zoo.md
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import zoo_timm, zoo_torchvision, zoo_transformers
from benchmarks.zoo.runner import latest, left, summary
from benchmarks.zoo.work import TOLERANCE

Row = dict[str, Any]
Key = tuple[str, str, str]

#: A reason that keeps a smaller share of the parameters than this is left out of the page.
SMALL = 0.005

TEXT = """# The zoo: any model

Made by `python -m benchmarks.zoo.table outputs/zoo/*.jsonl > docs/zoo.md`, from what these commands write:

    python benchmarks/zoo_torchvision.py --threads 1
    python benchmarks/zoo_timm.py --threads 1
    python benchmarks/zoo_transformers.py --threads 1

(`--failed` runs again what was not done, `--list` prints the names, and names choose models.)

What is done to each model, in a process of its own, with no code for any model in the library: it is built with random
weights, scaled so that no signal fades on the way; watched; half of the units of every prunable group are masked, drawn
at random; it is sped up, run on two new inputs, trained for one step, and run again.

- **exact**: every prunable group whose removal equals masking. Done means: fewer parameters, and outputs within
  {tolerance:g} of the output's size of those of a masked copy of the dense model, on both inputs; after that a training
  step with finite loss and gradients.
- **inexact too**: every prunable group, also those that a norm, a mean or a softmax runs across. Done means: fewer
  parameters, the right shapes, finite outputs, and a training step.

**Machine and versions.** {machine}. {versions}. Results of {dates}.
"""


def main(paths: list[str]) -> None:
    """Print the page."""
    rows: dict[Key, Row] = {}
    for path in paths:
        rows |= latest(Path(path))
    print(page(rows, zoo_parts()), end="")


def zoo_parts() -> list[tuple[str, str, list[str]]]:
    """Return ``(title, zoo, names)`` for each part of the zoo."""
    inside = zoo_torchvision.sections().items()
    return [
        *[(f"torchvision, {section.replace('_', ' ')}", "torchvision", names) for section, names in inside],
        ("timm, the smallest model of each module", "timm", zoo_timm.names()),
        ("transformers, tiny configurations", "transformers", zoo_transformers.names()),
    ]


def page(rows: dict[Key, Row], parts: list[tuple[str, str, list[str]]]) -> str:
    """Return the page as Markdown."""
    every = [row for zoo, _, row in _of(rows, parts) if zoo]
    lines = [
        TEXT.format(tolerance=TOLERANCE, machine=_machine(every), versions=_versions(every), dates=_dates(every)),
        "## How many are done",
        "",
        "| | models | exact | inexact too | with groups put back | prunable groups, exact | inexact | frozen | "
        "share of parameters in exact groups, median |",
        "|---|---|---|---|---|---|---|---|---|",
        *[_counts(rows, *part) for part in parts],
        "",
        "A group that is put back had been taken for prunable, and failed the proof or the replay; it stays whole, and "
        "the rest goes on.",
        "",
        "## Not done",
        "",
        *_not_done(rows, parts),
        "",
        "## What is frozen in segmentation, detection, video and optical flow, and by which operator",
        "",
        *_frozen(rows, parts),
        "",
        "## Every model",
        "",
        "Prunable: the share of the parameters that lie in prunable exact groups. Left: after half of every such group "
        "went. Error: the largest difference, as a share of the output's size. Removing units of an inexact group "
        "differs from masking them; of a frozen one none can go.",
    ]
    for title, zoo, names in parts:
        lines += ["", f"### {title[0].upper()}{title[1:]}", "", *_models(rows, zoo, names)]
    return "\n".join(lines) + "\n"


def _of(rows: dict[Key, Row], parts: list[tuple[str, str, list[str]]]) -> list[tuple[str, str, Row]]:
    return [
        (zoo, name, rows[zoo, name, mode])
        for _, zoo, names in parts
        for name in names
        for mode in ("exact", "all")
        if (zoo, name, mode) in rows
    ]


def _machine(rows: list[Row]) -> str:
    return "; ".join(sorted({row["machine"] for row in rows if "machine" in row})) or "Machine not written down"


def _versions(rows: list[Row]) -> str:
    keys = ("python", "torch", "torchvision", "timm", "transformers")
    found = {key: sorted({row[key] for row in rows if key in row}) for key in keys}
    return ", ".join(f"{key} {' and '.join(values)}" for key, values in found.items() if values)


def _dates(rows: list[Row]) -> str:
    commits = Counter(row["commit"] for row in rows)
    days = sorted({row["when"][:10] for row in rows})
    told = ", ".join(f"{commit} ({count})" for commit, count in commits.most_common())
    return f"{' and '.join(days[:: max(1, len(days) - 1)])}, of revisions {told}"


def _counts(rows: dict[Key, Row], title: str, zoo: str, names: list[str]) -> str:
    cells = [title, str(len(names))]
    for mode in ("exact", "all"):
        have = [rows[zoo, name, mode] for name in names if (zoo, name, mode) in rows]
        cells.append(f"**{sum(row['status'] == 'done' for row in have)}**")
    exact = [rows[zoo, name, "exact"] for name in names if (zoo, name, "exact") in rows]
    cells.append(str(sum(bool(row.get("put_back")) for row in exact)))
    seen = [row for row in exact if "groups_exact" in row]
    groups = [sum(row[f"groups_{kind}"] for row in seen) for kind in ("exact", "inexact", "frozen")]
    cells += [f"{count:,} ({count / max(sum(groups), 1):.0%})" for count in groups]
    cells.append(f"{median([row['share_exact'] for row in seen]):.0%}" if seen else "-")
    return f"| {' | '.join(cells)} |"


def _not_done(rows: dict[Key, Row], parts: list[tuple[str, str, list[str]]]) -> list[str]:
    out = ["| zoo | model | mode | why |", "|---|---|---|---|"]
    for _, zoo, names in parts:
        for name in names:
            why = {mode: _why(rows.get((zoo, name, mode))) for mode in ("exact", "all")}
            if why["exact"] and why["exact"] == why["all"]:
                why = {"both": why["exact"]}
            title = {"exact": "exact", "all": "inexact too", "both": "both"}
            out += [f"| {zoo} | {name} | {title[mode]} | {text} |" for mode, text in why.items() if text]
    return out if len(out) > 2 else ["All are done."]


def _why(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row["status"] == "done":
        return ""
    if row["status"] == "nothing" and not row.get("groups_asked"):
        reasons = "; ".join(item["reason"] for item in row.get("left_out", [])[:2])
        return f"it has no such group: {reasons}".replace("|", "\\|")
    return summary(row).strip().replace("|", "\\|")


def _frozen(rows: dict[Key, Row], parts: list[tuple[str, str, list[str]]]) -> list[str]:
    out = [
        "| model | groups: exact, inexact, frozen | frozen by, and the share of parameters that it keeps |",
        "|---|---|---|",
    ]
    for title, zoo, names in parts:
        if zoo != "torchvision" or "classification" in title:
            continue
        for name in names:
            row = rows.get((zoo, name, "exact"), {})
            if "groups_exact" not in row:
                out.append(f"| {name} | - | {_why(row or None)} |")
                continue
            reasons = [item for item in row["left_out"] if item["why"].startswith("frozen")]
            told = "; ".join(
                f"{item['why'][8:]}: {item['share']:.0%}" if item["share"] >= SMALL else item["why"][8:]
                for item in reasons
            )
            counts = ", ".join(str(row[f"groups_{kind}"]) for kind in ("exact", "inexact", "frozen"))
            out.append(f"| {name} | {counts} | {told or '-'} |")
    return out


def _models(rows: dict[Key, Row], zoo: str, names: list[str]) -> list[str]:
    out = [
        "| model | parameters | groups: exact, inexact, frozen | prunable | parameters left | MACs left | error | "
        "inexact too: parameters left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        exact, every = rows.get((zoo, name, "exact"), {}), rows.get((zoo, name, "all"), {})
        known = "groups_exact" in exact
        cells = [
            name,
            f"{exact['params']:,}" if "params" in exact else "-",
            ", ".join(str(exact[f"groups_{kind}"]) for kind in ("exact", "inexact", "frozen")) if known else "-",
            f"{exact['share_exact']:.0%}" if known else "-",
        ]
        if exact.get("status") == "done":
            cells += [left(exact, "params"), left(exact, "macs"), f"{exact['error_of_output']:.0e}"]
        else:
            cells += [exact.get("status", "not run"), "-", "-"]
        cells.append(left(every, "params") if every.get("status") == "done" else every.get("status", "not run"))
        out.append(f"| {' | '.join(cells)} |")
    return out


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give the files of results: python -m benchmarks.zoo.table outputs/zoo/*.jsonl")
    main(sys.argv[1:])
