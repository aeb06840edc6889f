"""A report's folder: pages, plots, figures, and the winner's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import METRICS
from nni_plugins.report.findings import Findings

REPORT, HTML, PLOT, PLOTS, DATA, BEST = "report.md", "report.html", "pareto.png", "plots", "report.json", "best"
EXPORTED = {
    "compact.onnx": "the compact model for onnxruntime and others",
    "int8.onnx": "the same in 8 bits; its test metric is the one above",
    "compact.pt2": "the compact model for `torch.export.load`",
    "compact.xml": "the compact model for OpenVINO, with `compact.bin`",
    "compact.bin": "its weights",
    "int8.xml": "the model in 8 bits for OpenVINO, with `int8.bin`",
    "int8.bin": "its weights",
}
"""What an export step leaves, and what it is."""
KEPT = (
    *("compact.safetensors", "masks.safetensors", "masked.safetensors", "plan.json", METRICS, "recipe.yml"),
    *("grids.json", "ranking.json"),
    *EXPORTED,
)
FILES = (
    "`report.html`, `report.md`: this page; `report.json`: the same figures for scripts",
    "`pareto.png`: the plot of the metric against MACs",
    "`plots/`: all plots, as PNG and as PDF for papers",
    "`best/compact.safetensors`: the compact model, "
    "for `nni_plugins.speedup.load_compact` (needs torch and safetensors only)",
    "`best/plan.json`: which units were kept; `best/masks.safetensors`, `best/masked.safetensors`: the masked model",
    "`best/recipe.yml`: the recipe with the tuner's values in it",
)


def write(findings: Findings, output: Path, source: Path | None) -> Path:
    """Write pages, plots, figures and the winner's files into `output`; returns it."""
    from nni_plugins.report.html import save_html, write_text
    from nni_plugins.report.page import page
    from nni_plugins.report.pareto import save_pareto
    from nni_plugins.report.plots import draw_all, save_all

    try:
        output.mkdir(parents=True, exist_ok=True)
        drawn = draw_all(findings)
        save_all(drawn, output / PLOTS)
        pareto = any(name.startswith("pareto-macs") for name in drawn)
        if pareto:
            save_pareto(findings, output / PLOT)
        else:
            (output / PLOT).unlink(missing_ok=True)
        files = [line for line in FILES if source is not None or "best/" not in line]
        files = [line for line in files if pareto or PLOT not in line]
        if source is not None:
            files += [f"`best/{name}`: {what}" for name, what in EXPORTED.items() if (source / name).is_file()]
        pictures = {name: f"{PLOTS}/{name}.png" for name in drawn if name != "pareto-macs"}
        write_text(output / REPORT, page(findings, PLOT if pareto else None, files, pictures))
        save_html(findings, output / HTML, files, drawn)
        write_text(output / DATA, json.dumps(findings.to_dict(), indent=1, default=str))
        if source is not None:
            (output / BEST).mkdir(exist_ok=True)
            for name in KEPT:
                if source != output / BEST and (source / name).is_file():
                    shutil.copyfile(source / name, output / BEST / name)
    except OSError as error:
        raise ExperimentError(f"{output}: the report cannot be written ({error.strerror})") from None
    return output
