"""YAML as people write it: ``1e-3`` is a number, a key given twice is a mistake, and every mistake is one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nni_plugins.training.errors import RecipeError, first_line

TAB = r"found character '\t' that cannot start any token"


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; no tag in it can make anything but plain data.

    Raises
    ------
    RecipeError
        In one line: the file, the line, what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path} cannot be read: {reason}") from None
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        problem = "a tab stands there; YAML is indented with spaces" if problem == TAB else problem
        raise RecipeError(f"{path.name}:{where} {problem}") from None
    except RecursionError:
        raise RecipeError(f"{path.name} is nested too deep") from None
    except ValueError as error:  # a number of more digits than Python reads, a date that is none
        raise RecipeError(f"{path.name}: {first_line(error)}") from None


def read_value(text: str) -> Any:
    """Return a value as a recipe would have it: ``'1e-3'`` is a number, ``'[1, 2]'`` a list.

    Raises
    ------
    yaml.YAMLError
        If it is no YAML.
    """
    return yaml.load(text, Loader=Loader)


class Loader(yaml.SafeLoader):
    """What :func:`read_yaml` and :func:`read_value` read with."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    return float(str(node.value).replace("_", ""))


Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
