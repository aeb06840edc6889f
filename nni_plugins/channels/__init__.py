"""The channel graph: watch one run of any model, and know which channels belong together and what each costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nni_plugins.channels.blocks import Block
    from nni_plugins.channels.cost import Cost
    from nni_plugins.channels.flexible import flexible
    from nni_plugins.channels.graph import ChannelGraph, ChannelGroup, Frozen, Member
    from nni_plugins.channels.plan import Plan

__all__ = ["Block", "ChannelGraph", "ChannelGroup", "Cost", "Frozen", "Member", "Plan", "flexible"]

_HOMES = {
    "Block": "blocks",
    "ChannelGraph": "graph",
    "ChannelGroup": "graph",
    "Cost": "cost",
    "Frozen": "graph",
    "Member": "graph",
    "Plan": "plan",
}


def __getattr__(name: str) -> Any:
    """Import on first use: loading a compact model needs only the flexible forwards."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
