"""New tensors and copies of others."""

from __future__ import annotations

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.elementwise import aligned, zeros_of_a_sum
from nni_plugins.channels.rules.registry import rule

_COPIES = (
    "clone detach detach_copy alias alias_copy lift lift_fresh lift_fresh_copy _to_copy contiguous dropout to "
    "resolve_conj resolve_neg _conj _conj_copy _neg_view _neg_view_copy _pin_memory _lazy_clone native_dropout "
    "_fused_dropout feature_dropout alpha_dropout _to_dense to_mkldnn _mkldnn_reorder"
).split()


@rule(*(f"aten.{name}" for name in _COPIES), "prims.convert_element_type")
def same(call: Call) -> list[MaybeLabels]:
    source = call.inputs[0]
    call.zero = source.zeros
    for index in range(1, len(call.outputs)):  # what was dropped
        if call.shape(index) == source.shape:
            call.give(index, list(source.labels))
    return list(source.labels)


@rule("aten.zeros_like", "aten.zero")
def zeros_like(call: Call) -> list[MaybeLabels]:
    call.zero = True
    return list(call.inputs[0].labels)


_LIKE = "ones_like empty_like rand_like randn_like randint_like bernoulli uniform normal_functional exponential random"


@rule(*(f"aten.{name}" for name in f"{_LIKE} geometric cauchy log_normal poisson binomial".split()))
def like(call: Call) -> list[MaybeLabels]:
    return list(call.inputs[0].labels)


def _is_zero(value: object) -> bool:
    return isinstance(value, (int, float, complex)) and value == 0  # not a tensor: that may hold anything


@rule("aten.fill", "aten.full_like")
def fill(call: Call) -> list[MaybeLabels]:
    call.zero = _is_zero(call.value(1, "value", call.value(1, "fill_value")))
    return list(call.inputs[0].labels)


_CONSTANTS = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided new_empty_strided"


@rule(*(f"aten.{name}" for name in f"{_CONSTANTS} empty_permuted _efficientzerotensor".split()))
def constant(call: Call) -> list[MaybeLabels]:
    """A tensor of one repeated value: any of its dimensions may shrink with what it meets."""
    name = call.cause.operator
    if name in ("aten.full", "aten.new_full"):
        call.zero = _is_zero(call.value(1 if name == "aten.full" else 2, "fill_value"))
    else:
        call.zero = "zero" in name
    return [call.fresh(size) if size > 1 else None for size in call.shape()]


_VALUES = (
    "arange linspace logspace rand randn randint randperm eye tril_indices triu_indices range normal hann_window "
    "hamming_window blackman_window bartlett_window kaiser_window"
).split()


@rule(*(f"aten.{name}" for name in _VALUES))
def values(call: Call) -> list[MaybeLabels]:
    """Each index has a value of its own, which would be another one in a smaller tensor: what it meets must stay."""
    if call.inputs and call.inputs[0].shape == call.shape():  # x.normal_()
        return list(call.inputs[0].labels)
    return [None] * len(call.shape())


@rule("aten.copy", "aten._copy_from")
def copy(call: Call) -> list[MaybeLabels]:
    target, source = call.inputs[0], call.inputs[1]
    call.zero = zeros_of_a_sum([source], call.shape())
    aligned(call, [target, source], call.shape())
    return list(target.labels)
