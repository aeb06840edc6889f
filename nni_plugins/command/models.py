"""The commands that look at models: ``inspect``, ``space``, ``bench``, ``export``."""

from __future__ import annotations

from typing import Any

import click

from nni_plugins.command import complete
from nni_plugins.command.options import (
    MODEL,
    PATH,
    SEARCHED,
    Command,
    Finite,
    argument_option,
    as_json,
    input_option,
    inputs_option,
    option,
    progress_option,
)

SENSITIVITY, LATENCY = "Sensitivity", "Latency"


@click.command(
    cls=Command,
    short_help="Show what can go from a model, and what not and why.",
    examples=[
        "nni-plugins inspect torchvision.models:resnet18 --input 1x3x224x224",
        "nni-plugins inspect net.py:build --argument width=64 --input 1x3x32x32 --plot groups.png",
        "nni-plugins inspect recipe.yml --sensitivity --json > groups.json",
    ],
)
@click.argument("model", shell_complete=complete.complete_model)
@input_option
@inputs_option
@argument_option
@option("--checkpoint", type=PATH, section=MODEL, help="Trained weights to read.")
@option("--device", section=MODEL, help="Where to run (default: where the model is).")
@option("--threads", type=click.IntRange(1), default=1, show_default=True, section=LATENCY, help="CPU threads.")
@option("--no-latency", is_flag=True, section=LATENCY, help="Time nothing.")
@option("--curves", is_flag=True, section=LATENCY, help="Time smaller sizes too: what is saved if a group shrinks.")
@option("--fresh", is_flag=True, section=LATENCY, help="Time again what this machine's cache knows.")
@option("--units", type=click.Choice(["heads", "head_dim"]), default="heads", help="What of attention can go.")
@option("--sensitivity", is_flag=True, section=SENSITIVITY, help="Evaluate the model with each group pruned alone.")
@option(
    "--metric",
    metavar="FUNCTION",
    section=SENSITIVITY,
    shell_complete=complete.complete_import,
    help="module:function from the model to a number, more is better.",
)
@option("--sparsities", default="0.25,0.5,0.75", show_default=True, section=SENSITIVITY, help="Shares of each group.")
@option("--plot", type=PATH, help="Draw the groups there: .png, .svg or .pdf.")
@progress_option
@as_json
def inspect(**options: Any) -> None:
    """Show a model's channel groups: what can go, what it costs, and what is frozen and why.

    MODEL is module:function or path/to/file.py:function (a function or class that makes the model), or a recipe.
    """
    from nni_plugins.report.inspect import run

    run(**options)


@click.command(
    cls=Command,
    short_help="Write a model's search space.",
    examples=[
        "nni-plugins space torchvision.models:resnet18 --input 1x3x224x224 --per stage > space.yml",
        "nni-plugins space recipe.yml --kind ranking --output space.yml",
    ],
)
@click.argument("model", shell_complete=complete.complete_model)
@input_option
@inputs_option
@argument_option
@option("--per", type=click.Choice(["group", "stage"]), default="group", show_default=True, section=SEARCHED)
@option(
    "--kind",
    type=click.Choice(["sparsity", "ranking"]),
    default="sparsity",
    show_default=True,
    section=SEARCHED,
    help="The share that each group loses, or corrections of its scores (LeGR).",
)
@option("--lowest", type=float, default=0.0, show_default=True, section=SEARCHED, help="Least sparsity.")
@option("--highest", type=float, default=0.8, show_default=True, section=SEARCHED, help="Greatest sparsity.")
@option("--levels", type=int, default=0, section=SEARCHED, help="So many choices in place of a range.")
@option("--inexact", is_flag=True, section=SEARCHED, help="Groups whose removal is not equal to masking too.")
@option("--output", type=PATH, help="Write it there (default: print it).")
@as_json
def space(**options: Any) -> None:
    """Write the search space of a model: which share each of its channel groups loses.

    MODEL is module:function or path/to/file.py:function (a function or class that makes the model), or a recipe.
    """
    from nni_plugins.report.space import run

    run(**options)


@click.command(
    cls=Command,
    short_help="Time dense and compact models.",
    examples=[
        "nni-plugins bench outputs/compress-digits --batches 1,8",
        "nni-plugins bench net.py:build --input 1x3x32x32 --runtimes eager,onnx --memory",
    ],
)
@click.argument("target", shell_complete=complete.complete_target)
@input_option
@inputs_option
@option("--batches", default="1,32", show_default=True, help="Sizes of the batch.")
@option("--runtimes", default="eager,compile,onnx,int8", show_default=True)
@option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of every runtime.")
@option(
    "--seconds",
    type=Finite(0, 3600, min_open=True),
    default=1.0,
    show_default=True,
    help="For each contender at each size.",
)
@option("--memory", is_flag=True, help="Peak memory too, each in a process of its own.")
@progress_option
@as_json
def bench(**options: Any) -> None:
    """Time dense and compact models, in torch and onnxruntime, in turns in one run.

    TARGET is a folder that a run or compress left (outputs/NAME), or module:function.
    """
    from nni_plugins.report.bench import run

    run(**options)


@click.command(
    cls=Command,
    short_help="Write a model as ONNX or .pt2, checked.",
    examples=[
        "nni-plugins export outputs/compress-digits --format onnx --format pt2",
        "nni-plugins export net.py:build --input 1x3x32x32 --output exported",
    ],
)
@click.argument("target", shell_complete=complete.complete_target)
@option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["onnx", "pt2", "tensorrt", "openvino"]),
    default=("onnx",),
)
@input_option
@inputs_option
@option("--output", type=PATH, help="Folder for the files (default: the target's, or outputs/export).")
@option("--fixed-batch", is_flag=True, help="Fix the size of the batch to the input's.")
@as_json
def export(**options: Any) -> None:
    """Write a compact model as ONNX or .pt2, and check the file against the model.

    TARGET is a folder that a run or compress left (outputs/NAME), or module:function.
    """
    from nni_plugins.command.places import check_writable
    from nni_plugins.report.export import run

    if options["output"] is not None:
        check_writable(options["output"], "--output")
    run(**options)


MODELS = (inspect, space, bench, export)
