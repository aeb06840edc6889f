"""What of NNI works without us gives the same with us: same masks, same trained weights, same compact shapes."""

import pytest

from tests.compat.subprocesses import run_python

CODE = "from tests.compat.everything import as_json; print(as_json())"


@pytest.fixture(scope="module")
def stock():
    return run_python(CODE, patched=False)


@pytest.fixture(scope="module")
def patched():
    return run_python(CODE, patched=True)


def test_each_compressor_that_works_without_us_gives_the_same(stock, patched):
    working = {name: result for name, result in stock.items() if ": " not in result and name != "ModelSpeedup"}
    assert len(working) >= 15
    assert {name: patched[name] for name in working} == working


def test_nothing_fails_with_us(patched):
    failed = {name: result for name, result in patched.items() if isinstance(result, str) and ": " in result}
    assert failed == {}


def test_speedup_is_the_same_where_it_works_without_us(stock, patched):
    assert patched["ModelSpeedup"]["shapes"] == [[4, 1, 3, 3], [4], [4, 4, 3, 3], [4], [2, 64], [2]]
    assert stock["ModelSpeedup"] == patched["ModelSpeedup"] or isinstance(stock["ModelSpeedup"], str)
