"""``nni-plugins``: run an experiment, look at it, report on it, compress by a recipe, inspect a model, check the rest.

Each command imports what it needs when it runs, so that ``nni-plugins --help`` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nni_plugins import __version__
from nni_plugins.command.errors import DEBUG, FAILED, OneLineGroup

if TYPE_CHECKING:
    from rich.console import Console

PATH = click.Path(path_type=Path)
SECONDS = click.FloatRange(0, 3600, min_open=True)
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

port_option = click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8080,
    envvar="NNI_PLUGINS_PORT",
    show_default=True,
    help="Port of NNI's web page.",
)
experiments_folder = click.option(
    "--experiments-folder",
    type=PATH,
    envvar="NNI_PLUGINS_EXPERIMENTS_FOLDER",
    help="Where NNI keeps experiments (default: as config.yml says, else ~/nni-experiments).",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


@click.group(cls=OneLineGroup, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="nni-plugins")
@click.option("--debug", is_flag=True, help=f"Show the traceback of an error (or set {DEBUG}=1).")
def commands(debug: bool) -> None:
    """Find a compact model with NNI, and prove that it equals the masked one."""
    if debug:
        os.environ[DEBUG] = "1"  # for the processes that this one starts, too


@commands.command()
@click.argument("experiment", type=PATH, required=False)
@port_option
@experiments_folder
@click.option("--output", type=PATH, help="Where the report and the best model go (default: outputs/NAME-ID).")
@click.option("--trials", type=click.IntRange(1), help="In place of maxTrialNumber in config.yml.")
@click.option("--concurrency", type=click.IntRange(1), help="In place of trialConcurrency in config.yml.")
@click.option(
    "--resume", metavar="ID", help="Go on with a stopped experiment; an architecture search needs EXPERIMENT."
)
@click.option(
    "--listen",
    type=click.Choice(["127.0.0.1", "0.0.0.0"]),
    default="127.0.0.1",
    show_default=True,
    help="Where NNI's web page can be seen from: it has no password, and can start any command.",
)
@as_json
def run(
    experiment: Path | None,
    port: int,
    experiments_folder: Path | None,
    output: Path | None,
    trials: int | None,
    concurrency: int | None,
    resume: str | None,
    listen: str,
    as_json: bool,
) -> None:
    """Run the experiment in a folder (or config.yml), and report on its best model.

    The same experiment as `nnictl create --config EXPERIMENT/config.yml`, followed to its end: progress, the best model
    evaluated on the test split once, a table dense against compact, report.md, pareto.png and the compact model itself.
    Ctrl-C stops it so that `--resume ID` goes on with it.
    """
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.session import run_experiment

    check_writable(output or Path("outputs"), "--output")
    if experiments_folder is not None:
        check_writable(experiments_folder, "--experiments-folder")
    console = make_console(as_json)
    findings, written = run_experiment(
        experiment, port, console, experiments_folder, output, trials, concurrency, resume, listen
    )
    show_findings(findings, written, console, as_json)


@commands.command()
@click.argument("experiment", required=False)
@experiments_folder
@click.option("--output", type=PATH, help="Where to write it (default: outputs/NAME-ID).")
@click.option("--no-test", is_flag=True, help="Leave the test split unread: the search will go on.")
@as_json
def report(
    experiment: str | None, experiments_folder: Path | None, output: Path | None, no_test: bool, as_json: bool
) -> None:
    """Report on an experiment: running, finished, or moved here from another machine.

    EXPERIMENT is an id (or its beginning), an experiment's folder, or a .tar.gz or .zip of one; the newest one by
    default. Writes report.html (one file, with its plots), report.md, report.json, plots/ and best/. While the
    experiment runs, and of an archive, no model is run and the test split is not read.

    Example: nni-plugins report && xdg-open outputs/digits-*/report.html
    """
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.reports import report_on

    console = make_console(as_json)
    check_writable(output or Path("outputs"), "--output")
    findings, written = report_on(experiment, experiments_folder, output, console.print, not no_test)
    show_findings(findings, written, console, as_json)


@commands.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@experiments_folder
@click.option("--output", type=PATH, help="Where to write it (default: outputs/compare-A-B).")
@as_json
def compare(first: str, second: str, experiments_folder: Path | None, output: Path | None, as_json: bool) -> None:
    """Compare two experiments, or two compressions: best models, fronts, and what was done differently.

    A and B are experiments as for `report`, or the folders of reports (outputs/NAME). Writes compare.html, .md, .json,
    .png and .pdf. Two that measure different things are refused.

    Example: nni-plugins compare outputs/digits-k3xv91qa outputs/digits_amc-x81nqvmz
    """
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.reports import compare_two

    console = make_console(as_json)
    check_writable(output or Path("outputs"), "--output")
    comparison, written = compare_two(first, second, experiments_folder, output)
    show_comparison(comparison, written, console, as_json)


@commands.command()
@click.argument("experiment", required=False)
@experiments_folder
@click.option("--all", "everything", is_flag=True, help="List all experiments that NNI knows, without their trials.")
@as_json
def status(experiment: str | None, experiments_folder: Path | None, everything: bool, as_json: bool) -> None:
    """Show an experiment's trials, with the reason of each that failed; the newest experiment by default."""
    from nni_plugins.experiment import status as view

    data = view.list_experiments() if everything else view.experiment_status(experiment, experiments_folder)
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        view.show(data, make_console(False))


@commands.command()
@click.argument("recipe", type=PATH)
@click.option("--output", type=PATH, help="Where the compact model goes (default: outputs/RECIPE's name).")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field: --set prune.sparsity=0.7")
@as_json
def compress(recipe: Path, output: Path | None, changes: tuple[str, ...], as_json: bool) -> None:
    """Prune, fine-tune and compact a model by a recipe, without NNI's tuner."""
    from nni_plugins.command.places import check_writable, undone_if_empty
    from nni_plugins.experiment.single import compress_recipe

    console = make_console(as_json)
    values = dict(map(parse_change, changes))
    output = output or Path("outputs") / f"compress-{recipe.resolve().parent.name}"
    check_writable(output, "--output")
    with undone_if_empty(output / "best", output.parent / "dense"):
        findings, written = compress_recipe(recipe, output, values, console)
    show_findings(findings, written, console, as_json)


@commands.command()
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="SIZES", help="1x3x224x224 or mask=1x16:int64; repeatable.")
@click.option("--inputs", "inputs_function", metavar="FUNCTION", help="module:function that returns an input instead.")
@click.option(
    "--argument", "arguments", multiple=True, metavar="NAME=VALUE", help="For the model's function; repeatable."
)
@click.option("--checkpoint", type=PATH, help="Trained weights to read.")
@click.option("--device", help="Where to run (default: where the model is).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of the latency.")
@click.option("--units", type=click.Choice(["heads", "head_dim"]), default="heads", help="What of attention can go.")
@click.option("--no-latency", is_flag=True, help="Time nothing.")
@click.option("--curves", is_flag=True, help="Time operators at smaller sizes too: what is saved if a group shrinks.")
@click.option("--fresh", is_flag=True, help="Time again what this machine's cache knows.")
@click.option("--sensitivity", is_flag=True, help="Evaluate the model with each group pruned alone.")
@click.option("--metric", metavar="FUNCTION", help="module:function from the model to a number, more is better.")
@click.option("--sparsities", default="0.25,0.5,0.75", show_default=True, help="For --sensitivity.")
@click.option("--plot", type=PATH, help="Draw the groups there: .png, .svg or .pdf.")
@as_json
def inspect(**options: Any) -> None:
    """Show a model's channel groups: what can go, what it costs, and what is frozen and why.

    MODEL is module:function or path/to/file.py:function (a function or class that makes the model), or a recipe.
    """
    from nni_plugins.report.inspect import run

    run(**options)


@commands.command()
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="SIZES", help="1x3x224x224 or mask=1x16:int64; repeatable.")
@click.option("--inputs", "inputs_function", metavar="FUNCTION", help="module:function that returns an input instead.")
@click.option(
    "--argument", "arguments", multiple=True, metavar="NAME=VALUE", help="For the model's function; repeatable."
)
@click.option("--per", type=click.Choice(["group", "stage"]), default="group", show_default=True)
@click.option(
    "--kind",
    type=click.Choice(["sparsity", "ranking"]),
    default="sparsity",
    show_default=True,
    help="What is searched: the share that each group loses, or corrections of its scores (LeGR).",
)
@click.option("--lowest", type=float, default=0.0, show_default=True, help="Least sparsity.")
@click.option("--highest", type=float, default=0.8, show_default=True, help="Greatest sparsity.")
@click.option("--levels", type=int, default=0, help="So many choices in place of a range.")
@click.option("--inexact", is_flag=True, help="Groups whose removal is not equal to masking too.")
@click.option("--output", type=PATH, help="Write it there (default: print it).")
@as_json
def space(**options: Any) -> None:
    """Write the search space of a model: which share each of its channel groups loses.

    MODEL is module:function or path/to/file.py:function (a function or class that makes the model), or a recipe.

    Example: nni-plugins space torchvision.models:resnet18 --input 1x3x224x224 --per stage > space.yml
    """
    from nni_plugins.report.space import run

    run(**options)


@commands.command()
@click.argument("target")
@click.option("--input", "inputs", multiple=True, metavar="SIZES", help="1x3x224x224 or mask=1x16:int64; repeatable.")
@click.option("--inputs", "inputs_function", metavar="FUNCTION", help="module:function that returns an input instead.")
@click.option("--batches", default="1,32", show_default=True, help="Sizes of the batch.")
@click.option("--runtimes", default="eager,compile,onnx,int8", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of every runtime.")
@click.option("--seconds", type=SECONDS, default=1.0, show_default=True, help="For each contender at each size.")
@click.option("--memory", is_flag=True, help="Peak memory too, each in a process of its own.")
@as_json
def bench(**options: Any) -> None:
    """Time dense and compact models, in torch and onnxruntime, in turns in one run.

    TARGET is a folder that a run or compress left (outputs/NAME), or module:function.

    Example: nni-plugins bench outputs/compress-digits --batches 1,8
    """
    from nni_plugins.report.bench import run

    run(**options)


@commands.command()
@click.argument("target")
@click.option("--format", "formats", multiple=True, type=click.Choice(["onnx", "pt2", "tensorrt"]), default=("onnx",))
@click.option("--input", "inputs", multiple=True, metavar="SIZES", help="1x3x224x224 or mask=1x16:int64; repeatable.")
@click.option("--inputs", "inputs_function", metavar="FUNCTION", help="module:function that returns an input instead.")
@click.option("--output", type=PATH, help="Folder for the files (default: the target's, or outputs/export).")
@click.option("--fixed-batch", is_flag=True, help="Fix the size of the batch to the input's.")
@as_json
def export(**options: Any) -> None:
    """Write a compact model as ONNX or .pt2, and check the file against the model.

    TARGET is a folder that a run or compress left (outputs/NAME), or module:function.

    Example: nni-plugins export outputs/compress-digits --format onnx --format pt2
    """
    from nni_plugins.report.export import run

    run(**options)


@commands.command()
@port_option
@experiments_folder
@as_json
def doctor(port: int, experiments_folder: Path | None, as_json: bool) -> None:
    """Check that NNI can work here, and say how to mend what cannot."""
    from nni_plugins.compat.doctor import run_checks

    findings = run_checks(experiments_folder, port)
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = "ok   " if finding.ok and not finding.warning else "note " if finding.ok else "WRONG"
            click.echo(f"{mark} {finding.name}: {finding.message}")
            if finding.remedy:
                click.echo(f"      {finding.remedy}")
    if not all(finding.ok for finding in findings):
        sys.exit(FAILED)


def parse_change(text: str, option: str = "--set") -> tuple[str, Any]:
    """``prune.sparsity=0.7`` as a path and a value, which is read as YAML."""
    import yaml

    from nni_plugins.training.yaml_file import read_value

    path, mark, value = text.partition("=")
    if not mark or not path.strip():
        raise click.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint=option)
    try:
        return path.strip(), read_value(value)
    except yaml.YAMLError:
        raise click.BadParameter(f"{value!r} is not a value", param_hint=option) from None


def make_console(quiet: bool) -> Console:
    """Where progress goes: standard error when standard output carries JSON."""
    from rich.console import Console

    return Console(stderr=quiet, markup=False)  # names and paths may hold brackets


def show_findings(findings: Any, written: Path, console: Console, as_json: bool) -> None:
    """Print the table and what was proved, or all of it as JSON."""
    from nni_plugins.report.table import proof_lines, rich_table

    if as_json:
        click.echo(json.dumps({**findings.to_dict(), "output": str(written)}, indent=2, default=str))
        return
    console.print(rich_table(findings))
    for line in proof_lines(findings):
        console.print(line, highlight=False, soft_wrap=True)
    for note in findings.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"report: {written / 'report.html'}, report.md", highlight=False, soft_wrap=True)


def show_comparison(comparison: Any, written: Path, console: Console, as_json: bool) -> None:
    """Print both models side by side, or all of it as JSON; warnings go to standard error."""
    from nni_plugins.report.compare_page import comparison_table, volume_words

    for warning in comparison.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps({**comparison.to_dict(), "output": str(written)}, indent=2, default=str))
        return
    console.print(comparison_table(comparison))
    for line in filter(None, [volume_words(comparison)]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"comparison: {written / 'compare.html'}, compare.md", highlight=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    commands(prog_name="nni-plugins")


if __name__ == "__main__":
    main()
