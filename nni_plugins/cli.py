"""``nni-plugins``: run an experiment, look at it, report on it, compress by a recipe, inspect a model, check the rest.

Each command imports what it needs when it runs, so that ``nni-plugins --help`` is quick.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import click

from nni_plugins import __version__
from nni_plugins.command import complete
from nni_plugins.command.errors import DEBUG, FAILED, OneLineGroup
from nni_plugins.command.models import MODELS
from nni_plugins.command.options import (
    MODEL,
    PATH,
    SEARCHED,
    Finite,
    argument_option,
    as_json,
    experiments_folder,
    input_option,
    option,
    port_option,
    progress_option,
    set_option,
)
from nni_plugins.command.values import parse_change

__all__ = ["commands", "main", "parse_change"]

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=OneLineGroup,
    context_settings=SETTINGS,
    sections={
        "Experiments": ("new", "run", "status", "report", "compare"),
        "Models": ("inspect", "space", "compress", "bench", "export"),
        "This machine": ("doctor", "completion"),
    },
    examples=[
        "nni-plugins new mine --model net.py:build --data net.py:loaders",
        "nni-plugins run mine",
        "nni-plugins compress mine/recipe.yml --set prune.sparsity=0.7",
    ],
    epilog="Exit codes: 0 done, 1 a mistake in a file or a task that failed, 2 wrong arguments, 70 a defect of "
    "nni-plugins, 130 Ctrl-C. An error is one line on standard error; results are on standard output.",
)
@click.version_option(__version__, prog_name="nni-plugins")
@click.option("--debug", is_flag=True, help=f"Show the traceback of an error (or set {DEBUG}=1).")
def commands(debug: bool) -> None:
    """Find a compact model with NNI, and prove that it equals the masked one."""
    if debug:
        os.environ[DEBUG] = "1"  # for the processes that this one starts, too
        warnings.simplefilter("default")


@commands.command(
    short_help="Write an experiment for your own model.",
    examples=[
        "nni-plugins new mine --model net.py:build --data net.py:loaders",
        "nni-plugins new birds --model torchvision.models:resnet18 --data images/ --input 1x3x64x64 --macs 0.4",
        "nni-plugins new try --model net.py:build --input 1x3x32x32 --data random  # no data at hand",
        "nni-plugins new mine --model net.py:build --remote me@gpu1 --remote me@gpu2:2222",
    ],
)
@click.argument("name", type=PATH)
@option("--model", required=True, section=MODEL, metavar="FUNCTION", shell_complete=complete.complete_import,
        help="module:function or path/to/file.py:function that makes it.")  # fmt: skip
@argument_option
@option("--checkpoint", type=PATH, section=MODEL, help="Trained weights; without them it is trained first.")
@input_option
@option("--data", default="digits", show_default=True, section=MODEL, shell_complete=complete.complete_data,
        help="module:function that returns loaders, a folder of images, digits, or random.")  # fmt: skip
@option("--macs", type=Finite(0, 1, min_open=True, max_open=True), default=0.5, show_default=True, section=SEARCHED,
        help="Share of the MACs that is left.")  # fmt: skip
@option("--tuner", type=click.Choice(["TPE", "Random", "Evolution", "Anneal", "Optuna"]), default="TPE",
        show_default=True, section=SEARCHED, help="Who chooses.")  # fmt: skip
@option("--per", type=click.Choice(["stage", "group"]), default="stage", show_default=True, section=SEARCHED,
        help="A share for each stage, or for each channel group.")  # fmt: skip
@option("--trials", type=click.IntRange(1), default=20, show_default=True, section=SEARCHED, help="How many.")
@option("--concurrency", type=click.IntRange(1), default=2, show_default=True, section=SEARCHED, help="At a time.")
@option(
    "--epochs", type=click.IntRange(0), default=20, show_default=True, help="Of dense training; half for fine-tuning."
)
@option("--remote", multiple=True, metavar="USER@HOST[:PORT]", help="Write config.remote.yml too; repeatable.")
@set_option
@as_json
def new(name: Path, as_json: bool, changes: tuple[str, ...], arguments: tuple[str, ...], **options: Any) -> None:
    """Write an experiment for your own model: a folder that `nni-plugins run` runs as it is.

    NAME is the folder. The model is built, watched, and its loss computed on a batch first: what cannot work is said
    now, and nothing is written then. What is searched comes from the model's channel groups, as `space` lists them.
    """
    from nni_plugins.command import show
    from nni_plugins.experiment.scaffold import Wanted, scaffold

    values = dict(parse_change(argument, "--argument") for argument in arguments)
    with show.only_results():
        made = scaffold(Wanted(name, arguments=values, changes=dict(map(parse_change, changes)), **options))
    show.show_scaffold(made, as_json)


@commands.command(
    short_help="Run an experiment to its report.",
    examples=[
        "nni-plugins run experiments/digits",
        "nni-plugins run mine --port 8090 --trials 50 --concurrency 4",
        "nni-plugins run --resume k3xv91qa  # go on where it was stopped",
        "nni-plugins run mine --json > findings.json  # progress stays on standard error",
    ],
)
@click.argument("experiment", type=PATH, required=False, shell_complete=complete.complete_experiment_folder)
@port_option
@experiments_folder
@option("--output", type=PATH, help="Where the report and the best model go (default: outputs/NAME-ID).")
@option("--trials", type=click.IntRange(1), help="In place of maxTrialNumber in config.yml.")
@option("--concurrency", type=click.IntRange(1), help="In place of trialConcurrency in config.yml.")
@option(
    "--resume",
    metavar="ID",
    shell_complete=complete.complete_experiment,
    help="Go on with a stopped experiment; an architecture search needs EXPERIMENT.",
)
@option(
    "--listen",
    type=click.Choice(["127.0.0.1", "0.0.0.0"]),
    default="127.0.0.1",
    show_default=True,
    help="Where NNI's web page can be seen from: it has no password, and can start any command.",
)
@progress_option
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
    progress: bool | None,
    as_json: bool,
) -> None:
    """Run the experiment in a folder (or config.yml), and report on its best model.

    The same experiment as `nnictl create --config EXPERIMENT/config.yml`, followed to its end: progress, the best model
    evaluated on the test split once, a table dense against compact, report.html and the compact model itself.
    Ctrl-C stops it so that `--resume ID` goes on with it. Progress is a bar on a terminal, else one line a trial.
    """
    from nni_plugins.command import show
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.session import run_experiment

    check_writable(output or Path("outputs"), "--output")
    if experiments_folder is not None:
        check_writable(experiments_folder, "--experiments-folder")
    console = show.progress(progress, default=True)
    with show.only_results():
        findings, written = run_experiment(
            experiment, port, console, experiments_folder, output, trials, concurrency, resume, listen
        )
    show.show_findings(findings, written, as_json)


@commands.command(
    short_help="Report on an experiment.",
    examples=[
        "nni-plugins report  # the newest experiment, to outputs/NAME-ID/report.html",
        "nni-plugins report k3xv --output outputs/mine",
        "nni-plugins report experiment.tar.gz --no-test",
    ],
)
@click.argument("experiment", required=False, shell_complete=complete.complete_experiment)
@experiments_folder
@option("--output", type=PATH, help="Where to write it (default: outputs/NAME-ID).")
@option("--no-test", is_flag=True, help="Leave the test split unread: the search will go on.")
@progress_option
@as_json
def report(
    experiment: str | None,
    experiments_folder: Path | None,
    output: Path | None,
    no_test: bool,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Report on an experiment: running, finished, or moved here from another machine.

    EXPERIMENT is an id (or its beginning), an experiment's folder, or a .tar.gz or .zip of one; the newest one by
    default. Writes report.html (one file, with its plots), report.md, report.json, plots/ and best/. While the
    experiment runs, and of an archive, no model is run and the test split is not read.
    """
    from nni_plugins.command import show
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.reports import report_on

    check_writable(output or Path("outputs"), "--output")
    console = show.progress(progress)
    with show.only_results():
        findings, written = report_on(experiment, experiments_folder, output, console.print, not no_test)
    show.show_findings(findings, written, as_json)


@commands.command(
    short_help="Compare two experiments.",
    examples=[
        "nni-plugins compare outputs/digits-k3xv91qa outputs/digits_amc-x81nqvmz",
        "nni-plugins compare k3xv x81n --output outputs/tuners",
    ],
)
@click.argument("first", metavar="A", shell_complete=complete.complete_experiment)
@click.argument("second", metavar="B", shell_complete=complete.complete_experiment)
@experiments_folder
@option("--output", type=PATH, help="Where to write it (default: outputs/compare-A-B).")
@as_json
def compare(first: str, second: str, experiments_folder: Path | None, output: Path | None, as_json: bool) -> None:
    """Compare two experiments, or two compressions: best models, fronts, and what was done differently.

    A and B are experiments as for `report`, or the folders of reports (outputs/NAME). Writes compare.html, .md, .json,
    .png and .pdf. Two that measure different things are refused.
    """
    from nni_plugins.command import show
    from nni_plugins.command.places import check_writable
    from nni_plugins.experiment.reports import compare_two

    check_writable(output or Path("outputs"), "--output")
    with show.only_results():
        comparison, written = compare_two(first, second, experiments_folder, output)
    show.show_comparison(comparison, written, as_json)


@commands.command(
    short_help="Show trials, and why failed ones failed.",
    examples=[
        "nni-plugins status  # the newest experiment",
        "nni-plugins status k3xv",
        "nni-plugins status --all",
    ],
)
@click.argument("experiment", required=False, shell_complete=complete.complete_experiment)
@experiments_folder
@option("--all", "everything", is_flag=True, help="List all experiments that NNI knows, without their trials.")
@as_json
def status(experiment: str | None, experiments_folder: Path | None, everything: bool, as_json: bool) -> None:
    """Show an experiment's trials, with the reason of each that failed; the newest experiment by default."""
    from nni_plugins.command import show
    from nni_plugins.experiment import status as view

    data = view.list_experiments() if everything else view.experiment_status(experiment, experiments_folder)
    if as_json:
        show.as_document(data)
    else:
        view.show(data, show.results())


@commands.command(
    short_help="Compress by one recipe, without a tuner.",
    examples=[
        "nni-plugins compress recipe.yml",
        "nni-plugins compress recipe.yml --set prune.sparsity=0.7 --set prune.pruner=taylor",
        "nni-plugins compress recipe.yml --output outputs/small --json > findings.json",
    ],
)
@click.argument("recipe", type=PATH, shell_complete=complete.complete_recipe)
@option("--output", type=PATH, help="Where the compact model goes (default: outputs/compress-FOLDER, the recipe's).")
@set_option
@progress_option
@as_json
def compress(recipe: Path, output: Path | None, changes: tuple[str, ...], progress: bool | None, as_json: bool) -> None:
    """Prune, fine-tune and compact a model by a recipe, without NNI's tuner.

    RECIPE is a YAML file: docs/recipe.md lists its fields. The dense model is trained once and kept for the next run.
    """
    from nni_plugins.command import show
    from nni_plugins.command.places import check_writable, undone_if_empty
    from nni_plugins.command.progress import Epochs
    from nni_plugins.experiment.single import compress_recipe

    values = dict(map(parse_change, changes))
    output = output or Path("outputs") / f"compress-{recipe.resolve().parent.name}"
    check_writable(output, "--output")
    with (
        undone_if_empty(output / "best", output.parent / "dense"),
        Epochs(show.progress(progress)) as console,
        show.only_results(),
    ):
        findings, written = compress_recipe(recipe, output, values, console)
    show.show_findings(findings, written, as_json)


@commands.command(
    short_help="Check this installation.",
    examples=["nni-plugins doctor", "nni-plugins doctor --port 8090 --json", "nni-plugins doctor --register"],
)
@port_option
@experiments_folder
@option("--register", is_flag=True, help="Register our tuners with NNI first, so that nnictl knows them by name.")
@as_json
def doctor(port: int, experiments_folder: Path | None, register: bool, as_json: bool) -> None:
    """Check that NNI can work here, and say how to mend what cannot.

    Python, torch, NNI and its node, our patches and tuners, disk and port, and whether a server is open to others.
    Exit code 1 where something that is needed does not work.
    """
    from nni_plugins.command.checks import all_checks
    from nni_plugins.command.show import show_checks

    if register:
        from nni_plugins.search.registration import register_all

        register_all()
    findings = all_checks(experiments_folder, port)
    show_checks(findings, as_json)
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(FAILED)


@commands.command(
    short_help="Print the script for tab completion.",
    examples=[
        'eval "$(nni-plugins completion bash)"  # in ~/.bashrc',
        'eval "$(nni-plugins completion zsh)"  # in ~/.zshrc',
        "nni-plugins completion fish > ~/.config/fish/completions/nni-plugins.fish",
    ],
)
@click.argument("shell", type=click.Choice(complete.SHELLS))
def completion(shell: str) -> None:
    """Print what a shell needs to complete commands, options, experiment ids, fields and functions by Tab."""
    click.echo(complete.script(shell, commands))


for command in MODELS:
    commands.add_command(command)


def main() -> None:
    """The console script."""
    commands(prog_name="nni-plugins")


if __name__ == "__main__":
    main()
