"""What of NNI works without us gives the same with us: same masks, same trained weights, same compact models."""

import pytest

from tests.compat.subprocesses import run_python

CODE = "from tests.compat.everything import as_json; print(as_json())"

# How ModelSpeedup ends without us, by the patch that mends it.
KNOWN = {
    "tensor-base": "AttributeError: 'NoneType' object has no attribute 'startswith'",
    "wraps-type": "TypeError: __type_params__ must be set to a tuple",
}
# Half the outputs of each masked convolution are gone, and the inputs of what reads them.
SHAPES = {
    "Chain": {"first.weight": [4, 1, 3, 3], "last.weight": [4, 4, 3, 3], "head.weight": [2, 64]},
    "Joined": {
        "first.weight": [4, 1, 3, 3],
        "left.weight": [4, 4, 3, 3],
        "right.weight": [4, 4, 3, 3],
        "last.weight": [4, 8, 3, 3],
        "head.weight": [2, 4],
    },
}


@pytest.fixture(scope="module")
def stock():
    return run_python(CODE, patched=False)


@pytest.fixture(scope="module")
def patched():
    return run_python(CODE, patched=True)


def test_each_compressor_that_works_without_us_gives_the_same(stock, patched):
    working = {name: result for name, result in stock["compressors"].items() if ": " not in result}
    assert len(working) >= 15
    assert {name: patched["compressors"][name] for name in working} == working


def test_nothing_fails_with_us(patched):
    assert {name: result for name, result in patched["compressors"].items() if ": " in result} == {}
    assert {name: result for name, result in patched["speedup"].items() if "error" in result} == {}
    assert "failed" not in patched["states"].values()


@pytest.mark.parametrize("net", SHAPES)
def test_nni_speedup_with_us_is_small_and_equals_the_masked_model(patched, net):
    found = patched["speedup"][net]
    assert {name: shape for name, shape in found["shapes"].items() if name.endswith("weight")} == SHAPES[net]
    for compact, masked in zip(found["output"], found["masked"], strict=True):
        assert compact == pytest.approx(masked, abs=1e-6)


@pytest.mark.parametrize("net", SHAPES)
def test_nni_speedup_without_us_gives_the_same_or_fails_as_a_patch_of_ours_mends(stock, patched, net):
    without = stock["speedup"][net]
    if "error" not in without:
        assert without == patched["speedup"][net]
    else:
        assert without["error"] in {KNOWN[name] for name in KNOWN if patched["states"][name] == "applied"}
