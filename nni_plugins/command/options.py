"""Options that several commands share, and a command whose help groups its options and teaches by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from nni_plugins.command.complete import complete_import, complete_recipe_field

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
OTHERS, COMMON, MODEL, SEARCHED = "Options", "Common options", "The model and its input", "What is searched"


class Finite(click.FloatRange):
    """A number in a range; ``nan`` is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number to count with", param, ctx)
        return number


class Option(click.Option):
    """An option that stands in a section of the help.

    Parameters
    ----------
    section
        Heading.
    """

    def __init__(self, *args: Any, section: str = OTHERS, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class Command(click.Command):
    """A command with examples.

    Parameters
    ----------
    examples
        Lines, each a command, perhaps with ``  # comment``.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write options by section, the command's own first."""
        sections: dict[str, list[tuple[str, str]]] = {OTHERS: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                heading = COMMON if "--help" in param.opts else getattr(param, "section", OTHERS)
                sections.setdefault(heading, []).append(record)
        for heading in sorted(sections, key=lambda name: (name == COMMON, name != OTHERS)):
            if sections[heading]:
                with formatter.section(heading):
                    formatter.write_dl(sections[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one a line, as they are to be typed."""
        write_examples(self.examples, formatter)


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Write commands, perhaps with ``  # comment``, one a line."""
    if examples:
        width = max((len(line.partition("  # ")[0]) for line in examples if "  # " in line), default=0)
        with formatter.section("Examples"):
            for line in examples:
                command, mark, comment = line.partition("  # ")
                text = f"{command:<{width}}  # {comment}" if mark else command
                formatter.write(f"{'':>{formatter.current_indent}}{text}\n")


def option(*names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """:func:`click.option`, with a section."""
    return click.option(*names, cls=Option, **settings)


port_option = option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8080,
    envvar="NNI_PLUGINS_PORT",
    show_default=True,
    help="Port of NNI's web page.",
)
experiments_folder = option(
    "--experiments-folder",
    type=PATH,
    envvar="NNI_PLUGINS_EXPERIMENTS_FOLDER",
    help="Where NNI keeps experiments (default: as config.yml says, else ~/nni-experiments).",
)
as_json = option("--json", "as_json", is_flag=True, section=COMMON, help="Print one JSON document, for scripts.")
progress_option = option(
    "--progress/--no-progress",
    default=None,
    section=COMMON,
    help="Say on standard error how far it is (default: on a terminal).",
)
input_option = option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SIZES",
    section=MODEL,
    help="1x3x224x224 or mask=1x16:int64; repeatable.",
)
inputs_option = option(
    "--inputs",
    "inputs_function",
    metavar="FUNCTION",
    section=MODEL,
    shell_complete=complete_import,
    help="module:function that returns an input instead.",
)
argument_option = option(
    "--argument",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    section=MODEL,
    help="For the model's function; repeatable.",
)
set_option = option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    shell_complete=complete_recipe_field,
    help="Change a field: --set prune.sparsity=0.7; repeatable.",
)
