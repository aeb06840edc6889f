"""The channel graph: watch one run of any model, and know which channels belong together and what each costs."""

from nni_plugins.channels.cost import Cost
from nni_plugins.channels.graph import ChannelGraph, ChannelGroup, Frozen, Member
from nni_plugins.channels.plan import Plan

__all__ = ["ChannelGraph", "ChannelGroup", "Cost", "Frozen", "Member", "Plan"]
