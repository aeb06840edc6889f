"""``NAME=VALUE`` on the command line."""

from __future__ import annotations

from typing import Any

import click


def parse_change(text: str, option: str = "--set") -> tuple[str, Any]:
    """``prune.sparsity=0.7`` as a path and a value, which is read as YAML."""
    import yaml

    from nni_plugins.training.yaml_file import read_value

    path, mark, value = text.partition("=")
    if not mark or not path.strip():
        raise click.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint=option)
    try:
        return path.strip(), read_value(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise click.BadParameter(f"{value!r} is not a value", param_hint=option) from None
