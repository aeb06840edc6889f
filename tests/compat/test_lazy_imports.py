"""NNI without the frameworks that it imports and a trial does not use; they come when they are asked for."""

import importlib.util

import pytest

from nni_plugins.compat import patches
from tests.compat.subprocesses import run_python

HEAVY = ("pandas", "scipy.stats", "pytorch_lightning", "lightning_fabric", "transformers", "torchmetrics", "deepspeed")


@pytest.fixture(scope="module")
def lazy():
    return run_python(
        f"""
        import json, sys
        import nni.compression.pruning
        early = [name for name in {HEAVY!r} if name in sys.modules]
        import nni, json_tricks
        import nni.common.version as version
        from nni.compression.utils import evaluator
        plain = nni.dump({{"default": 0.5, "macs": 3}})
        still = "pandas" in sys.modules
        sample = nni.mutable.Numerical(0, 1, label="a").random()
        drawn = type(nni.mutable.Numerical(mu=0, sigma=1, label="b").distribution).__name__
        import pandas
        frame = json_tricks.loads(json_tricks.dumps({{"f": pandas.DataFrame({{"a": [1, 2]}})}}))["f"]
        flags = [evaluator.LIGHTNING_INSTALLED, evaluator.TRANSFORMERS_INSTALLED, evaluator.DEEPSPEED_INSTALLED]
        from nni_plugins.compat import patches
        states = {{p.name: [p.state, p.detail] for p in patches()}}
        if flags[0]:
            import pytorch_lightning
        if flags[1]:
            import transformers.trainer
        later = {{p.name: p.state for p in patches()}}
        print(json.dumps({{"states": states, "later": later,
            "early": early, "still": still, "plain": plain, "sample": bool(0 <= sample <= 1), "drawn": drawn,
            "frame": frame["a"].tolist(), "versions": version.version_dump(), "flags": flags,
        }}))
        """,
        patched=True,
    )


@pytest.fixture(scope="module")
def stock():
    return run_python(
        """
        import json
        import nni.common.version as version
        from nni.compression.utils import evaluator
        flags = [evaluator.LIGHTNING_INSTALLED, evaluator.TRANSFORMERS_INSTALLED, evaluator.DEEPSPEED_INSTALLED]
        print(json.dumps({"versions": version.version_dump(), "flags": flags}))
        """,
        patched=False,
    )


def test_heavy_modules_stay_out(lazy):
    assert lazy["early"] == []


def test_a_metric_is_dumped_without_pandas(lazy):
    assert not lazy["still"]
    assert lazy["plain"] == '{"default": 0.5, "macs": 3}'


def test_what_is_deferred_works_when_it_is_used(lazy):
    assert lazy["sample"]
    assert lazy["drawn"].startswith("rv_continuous")
    assert lazy["frame"] == [1, 2]


def test_versions_and_flags_are_those_of_stock(lazy, stock):
    assert lazy["versions"] == stock["versions"]
    assert lazy["flags"] == stock["flags"]


def test_lazy_lightning_answers_isinstance():
    lightning = pytest.importorskip("pytorch_lightning")
    from nni.compression.utils import evaluator

    assert not isinstance(object(), evaluator.pl.Trainer)
    assert evaluator.pl.LightningModule is lightning.LightningModule
    assert evaluator.pl is lightning


@pytest.mark.parametrize("framework", ["pytorch_lightning", "transformers"])
def test_what_lies_in_a_framework_waits_for_it(lazy, framework):
    mine = {patch.name for patch in patches() if patch.framework.partition(".")[0] == framework}
    assert len(mine) == {"pytorch_lightning": 1, "transformers": 3}[framework]
    if importlib.util.find_spec(framework) is None:
        assert [lazy["states"][name] for name in mine] == [["not needed", f"{framework} is not installed"]] * len(mine)
    else:
        assert {lazy["states"][name][0] for name in mine} == {"waiting"}
        assert {lazy["later"][name] for name in mine} <= {"applied", "not needed"}
