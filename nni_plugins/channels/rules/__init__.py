"""Label rules: how labels flow through each ATen operator, one small function a rule, one file a family.

Adding an operator is one function under ``@rule('aten.name')`` in the family's file, and one row in its test.
An operator without a rule freezes what it touches, and is named in :attr:`ChannelGraph.frozen`.
"""

from __future__ import annotations

from nni_plugins.channels.rules.registry import RULES, rule, rule_for

__all__ = ["RULES", "rule", "rule_for"]


def _load() -> None:
    from nni_plugins.channels.rules import (  # noqa: F401
        attention,
        convolution,
        creation,
        elementwise,
        indexing,
        joining,
        matmul,
        normalisation,
        pooling,
        recurrent,
        reduction,
        transforms,
        views,
    )


_load()
