"""A part of the zoo that is quick: half of every group goes, the rest equals the masked model, and trains a step.

All of it: ``python benchmarks/zoo_torchvision.py``, ``zoo_timm.py``, ``zoo_transformers.py``.
"""

from __future__ import annotations

import pytest

from benchmarks.zoo.work import TOLERANCE, work

TORCHVISION = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet"]
TIMM = ["levit_128s", "efficientvit_b0", "edgenext_xx_small"]
TRANSFORMERS = ["bert", "gpt2", "llama", "t5", "whisper", "swin", "convnext", "wav2vec2"]
#: Smallest share of the parameters that must be prunable exactly: heads and hidden units, not the width.
HEADS_AND_HIDDEN = {"bert": 0.75, "gpt2": 0.7, "llama": 0.75, "t5": 0.85, "whisper": 0.7, "swin": 0.8}


def check(build, mode: str) -> dict:
    row = work(build, mode, lambda data: None)
    assert row["status"] == "done", row
    assert row["trained"].startswith("train"), row
    assert not row["put_back"], row["put_back"]
    assert row["params_after"] < row["params_before"]
    if mode == "exact":
        assert row["error_of_output"] <= TOLERANCE
        assert row["signal"]["inputs"] > 1e-3, "an output that hardly depends on the input could hide an error"
    return row


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    pytest.importorskip("torchvision")
    from benchmarks.zoo_torchvision import build

    row = check(lambda: build(name), "exact")
    assert row["macs_after"] < 0.5 * row["macs_before"]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    pytest.importorskip("timm")
    from benchmarks.zoo_timm import build

    check(lambda: build(name), "exact")


@pytest.mark.parametrize("mode", ["exact", "all"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, mode):
    pytest.importorskip("transformers")
    from benchmarks.zoo_transformers import build

    row = check(lambda: build(name), mode)
    if mode == "exact":
        assert row["share_exact"] >= HEADS_AND_HIDDEN.get(name, 0.0)
    else:
        assert row["groups_removed"] >= row["groups_exact"], "the width goes too"


def test_every_name_in_the_tables_is_one_of_the_zoo():
    from benchmarks import zoo_timm, zoo_transformers

    assert set(TIMM) <= set(zoo_timm.names())
    assert set(TRANSFORMERS) <= set(zoo_transformers.names())
    assert len(zoo_timm.names()) >= 90
    assert len(zoo_transformers.names()) >= 40
