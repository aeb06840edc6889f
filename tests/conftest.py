"""Two cores are all there is: one thread a test, so that nothing waits for itself. And chance begins anew with each test."""

import os
import random
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latencies that this process has measured, and not what lies in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_PLUGINS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def own_path() -> Iterator[None]:
    """The folders of a recipe's own modules stay on the path; another file's ``net.py`` is not to be found there."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def seed(number: int) -> None:
    """What a test draws is the same whatever ran before it in this process, which the order of the files decides."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):  # what it draws when it is imported
        seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed(2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed(3)  # whether or not a fixture of its module was made just now
