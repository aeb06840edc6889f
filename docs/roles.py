"""For the site: names in docstrings, ``:class:`~package.Name` ``, as code in Markdown. Loaded by mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:\w+:)?(?:class|meth|func|mod|attr|data|exc|obj|ref):`([^`]+)`")


def as_code(match: re.Match[str]) -> str:
    name = match[1]
    return f"`{name.rpartition('.')[2] if name.startswith('~') else name.lstrip('.')}`"


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(as_code, obj.docstring.value)
