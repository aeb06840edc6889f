"""Two processes of one distributed run (gloo, loopback), and what each of them found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo on loopback"
)

BEGIN = """
import os, sys, nni, torch, torch.distributed as dist
from torch import nn
from nni.compression import TorchEvaluator

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
"""
END = """
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def on_two_ranks(script: str, folder: Path) -> list[Any]:
    """Run a script, which knows its ``rank`` and leaves a ``result``, in two processes; return both results."""
    command = [sys.executable, "-c", BEGIN + script + END, str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
