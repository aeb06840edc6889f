from nni_plugins.pruners import RandomPruner

from .nets import X, make

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def kept(seed, config=HALF, **kwargs):
    pruner = RandomPruner(make("residual", seed=7), config, dummy_input=X, seed=seed, **kwargs)
    pruner.compress()
    return {name: units.tolist() for name, units in pruner.plan.kept.items()}


def test_same_seed_same_masks_and_another_seed_others():
    assert kept(3) == kept(3)
    assert kept(3) != kept(4)
    assert kept(3, scope="global", target="macs") == kept(3, scope="global", target="macs")


def test_what_a_group_loses_does_not_depend_on_the_others():
    alone = kept(3, [{"op_names": ["a1"], "sparse_ratio": 0.5}])
    assert alone["a1"] == kept(3)["a1"]
