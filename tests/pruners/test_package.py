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
    assert dict(pruners.PRUNERS) == {
        "magnitude": pruners.MagnitudePruner,
        "random": pruners.RandomPruner,
        "taylor": pruners.TaylorPruner,
    }
    with pytest.raises(KeyError):
        pruners.PRUNERS["none"]
    with pytest.raises(AttributeError, match="NoPruner"):
        _ = pruners.NoPruner


def test_signatures_show_the_shared_arguments():
    for cls in pruners.PRUNERS.values():
        shown = inspect.signature(cls).parameters
        assert {"dummy_input", "scope", "target", "round_to", "exact_only", "schedule", "tolerance"} <= set(shown)
        assert not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in shown.values())
