import inspect
import subprocess
import sys

import pytest

import nni_plugins.pruners as pruners


def test_nni_is_imported_only_when_a_pruner_is_asked_for():
    code = (
        "import sys, nni_plugins.pruners as p; assert 'nni' not in sys.modules and list(p.PRUNERS);"
        "assert 'nni' not in sys.modules and 'torch' not in sys.modules; p.MagnitudePruner; assert 'nni' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_registry_holds_the_classes_by_recipe_name():
    from nni.compression.base.compressor import Pruner

    assert {"magnitude", "random", "taylor", "weight_magnitude", "dynamic_sparse", "lottery_ticket"} <= set(
        pruners.PRUNERS
    )
    assert pruners.PRUNERS["magnitude"] is pruners.MagnitudePruner
    for cls in pruners.PRUNERS.values():
        assert issubclass(cls, Pruner)
        assert cls.__name__ in pruners.__all__
        assert isinstance(cls.fusible, bool)
    with pytest.raises(KeyError):
        pruners.PRUNERS["none"]
    with pytest.raises(AttributeError, match="NoPruner"):
        _ = pruners.NoPruner


def test_signatures_show_the_shared_arguments():
    shared = {
        pruners.GroupPruner: {"dummy_input", "scope", "target", "round_to", "exact_only", "schedule", "tolerance"},
        pruners.WeightPruner: {"dummy_input", "scope", "density", "pattern", "normalise", "schedule"},
    }
    for cls in pruners.PRUNERS.values():
        shown = inspect.signature(cls).parameters
        wanted = next((names for base, names in shared.items() if issubclass(cls, base)), None)
        own = inspect.signature(cls.__init__).parameters.values()
        if wanted is not None and any(item.kind is inspect.Parameter.VAR_KEYWORD for item in own):
            assert wanted <= set(shown)
            assert not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in shown.values())
