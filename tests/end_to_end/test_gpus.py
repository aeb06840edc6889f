"""Where NNI puts trials on GPUs, with a stub in place of the driver's query: only ``pynvml`` is not real."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_faults import script, status, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")

PYNVML = """
import os
from collections import namedtuple
Memory, Rates, Process = (namedtuple(*one) for one in (("Memory", "total free"), ("Rates", "gpu memory"),
                                                       ("Process", "pid usedGpuMemory")))
folder = os.path.dirname(os.path.abspath(__file__))
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return int(open(os.path.join(folder, "count")).read())
def nvmlSystemGetDriverVersion(): return "stub"
def nvmlSystemGetCudaDriverVersion_v2(): return 12000
def nvmlSystemGetProcessName(pid): return "other"
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(index): return "stub"
def nvmlDeviceGetNumGpuCores(index): return 1
def nvmlDeviceGetMemoryInfo(index): return Memory(1 << 30, 1 << 30)
def nvmlDeviceGetUtilizationRates(index): return Rates(0, 0)
def nvmlDeviceGetComputeRunningProcesses_v3(index):
    return [Process(1, 1)] if os.path.exists(os.path.join(folder, f"busy{index}")) else []
def nvmlDeviceGetGraphicsRunningProcesses_v3(index): return []
"""
TRIAL = """
import os, time
from pathlib import Path
import nni_plugins, nni
nni.get_next_parameter()
here = Path(os.environ["NNI_OUTPUT_DIR"])
(here / "started").touch()
deadline = time.time() + 300
together = False
while not together and time.time() < deadline and "ALONE" not in os.environ:
    together = len(list(here.parent.glob("*/started"))) == 2
    time.sleep(0.2)
nni.report_final_result({"default": 1.0, "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "together": together})
"""


@pytest.fixture
def gpus(nni_home: Any, tmp_path: Path) -> Path:
    """The folder of the stub: ``count`` says how many there are, ``busyN`` that another program is on one."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "pynvml.py").write_text(PYNVML, encoding="utf-8")
    nni_home.environment["PYTHONPATH"] = str(folder)
    return folder


def test_two_trials_share_a_gpu_where_the_configuration_says_so(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], gpus: Path
) -> None:
    (gpus / "count").write_text("1")
    service = {"platform": "local", "useActiveGpu": True, "maxTrialNumberPerGpu": 2}
    folder = script(write_experiment, TRIAL, trialGpuNumber=1, maxTrialNumber=2, trainingService=service)
    nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), check=False)
    (entry,) = nni_home.managers()
    one, two = (trial["metrics"] for trial in status(nni_home, entry["id"])["trials"])
    assert (one["gpus"], two["gpus"]) == ("0", "0")
    assert one["together"]
    assert two["together"]


def test_a_trial_waits_for_a_busy_gpu_says_so_and_gets_the_whole_machine(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], gpus: Path
) -> None:
    (gpus / "count").write_text("2")
    (gpus / "busy1").touch()
    nni_home.environment["ALONE"] = "1"
    service = {"platform": "local", "useActiveGpu": False}
    folder = script(
        write_experiment, TRIAL, trialGpuNumber=2, maxTrialNumber=1, trialConcurrency=1, trainingService=service
    )
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))

    def waiting() -> str:
        return json.loads(nni_home.run("nni-plugins", "status", "--json").stdout)["waiting"]

    reason = until(waiting)
    assert command.stderr is not None
    told = ""
    for line in command.stderr:
        told += line
        if "waiting:" in told:  # it looks once a second
            (gpus / "busy1").unlink(missing_ok=True)
    output, _ = command.communicate(timeout=300)
    assert f"waiting: {reason}" in " ".join((output + told).split())
    (entry,) = nni_home.managers()
    (trial,) = status(nni_home, entry["id"])["trials"]
    assert trial["metrics"]["gpus"] == "0,1"  # NNI by itself refuses a trial that asks for all GPUs


def test_more_gpus_than_there_are_is_one_line(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], gpus: Path
) -> None:
    (gpus / "count").write_text("1")
    service = {"platform": "local", "useActiveGpu": False}
    folder = script(write_experiment, TRIAL, trialGpuNumber=2, trainingService=service)
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), check=False)
    assert answer.returncode == 1
    assert answer.stderr == (
        "nni-plugins: trialGpuNumber asks for 2 GPUs, and NNI sees 1 here; leave it out to let trials choose their device\n"
    )
    assert nni_home.managers() == []
