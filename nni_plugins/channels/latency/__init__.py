"""Latency by group, measured operator by operator on this machine, once."""

from nni_plugins.channels.latency.cache import cache_folder
from nni_plugins.channels.latency.table import LatencyTable

__all__ = ["LatencyTable", "cache_folder"]
