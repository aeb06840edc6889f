"""Pointwise operators, and those that copy: aligned dimensions are tied, broadcast ones are not."""

from __future__ import annotations

from nni_plugins.channels.call import Call, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

#: Unary (and scalar) functions with f(0) = 0: a masked channel stays zero through them.
ZERO_PRESERVING = frozenset(
    (
        "abs asin asinh atan atanh celu ceil clone copy detach elu erf expm1 floor gelu hardshrink hardswish "
        "leaky_relu log1p mish neg prelu _prelu_kernel relu relu6 round rrelu_with_noise selu sgn sign silu "
        "sin sinh softshrink sqrt square tan tanh trunc rad2deg deg2rad nan_to_num positive alias lift_fresh "
        "_to_copy contiguous"
    ).split()
)

_LINEAR = frozenset(["add", "sub", "rsub"])


def aligned(call: Call, infos: list[Info], shape: tuple[int, ...]) -> list[MaybeLabels]:
    """Tie the dimensions of ``infos`` that meet under broadcasting, and return the labels of the result."""
    out: list[MaybeLabels] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        met = [i.labels[-back] for i in infos if len(i.shape) >= back and i.shape[-back] == size]
        if size == 1:
            out.append(next((labels for labels in met if labels is not None), None))
            continue
        for labels in met[1:]:
            call.tie(met[0], labels)
        out.append(next((labels for labels in met if labels is not None), None))
    return out


#: Pointwise operators that torch does not tag as such.
UNTAGGED = (
    "aten.hardswish aten.hardsigmoid aten.hardtanh aten.relu6 aten.elu aten.celu aten.selu "
    "aten.leaky_relu aten.softplus aten.mish aten.silu aten.gelu aten.log_sigmoid_forward aten.threshold "
    "aten.rrelu_with_noise aten.clamp aten.relu aten.sigmoid aten.tanh aten.lerp aten.addcmul "
    "aten.addcdiv aten.logit aten.softshrink aten.hardshrink"
).split()


@rule("pointwise", *UNTAGGED)
def pointwise(call: Call) -> list[MaybeLabels]:
    tensors = [info for info in call.inputs if info.shape]
    short = call.cause.operator.removeprefix("aten.").rstrip("_")
    labelled = [info for info in tensors if any(labels is not None for labels in info.labels)]
    scalars = sum(isinstance(a, (int, float, complex)) and not isinstance(a, bool) for a in call.args[1:])
    if short == "mul":
        call.zero = any(info.zero for info in labelled)
    elif short == "div":
        call.zero = bool(labelled) and labelled[0].zero and call.inputs[0] is labelled[0]
    elif short in _LINEAR:
        no_shift = len(call.inputs) > 1 or not scalars or call.args[1] == 0
        call.zero = no_shift and len(labelled) == len(call.inputs) and all(info.zero for info in labelled)
    elif short in ZERO_PRESERVING or (short == "pow" and scalars and call.args[1] > 0):
        call.zero = bool(labelled) and labelled[0].zero
    elif short in ("hardtanh", "clamp"):
        low, high = call.value(1, "min_val", None), call.value(2, "max_val", None)
        inside = (low is None or _at_most(low, 0)) and (high is None or _at_most(0, high))
        call.zero = bool(labelled) and labelled[0].zero and inside
    out = aligned(call, tensors, call.shape())
    for index in range(1, len(call.outputs)):  # what the backward pass wants, of the same shape or empty
        if call.shape(index) == call.shape():
            call.give(index, list(out))
    return out


def _at_most(a: object, b: object) -> bool:
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a <= b


@rule(
    "aten.clone",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten._to_copy",
    "aten.contiguous",
    "aten.native_dropout",
    "aten.dropout",
    "aten.to",
    "prims.convert_element_type",
    "aten.zeros_like",
    "aten.bernoulli",
    "aten.fill",
    "aten.zero",
)
def same(call: Call) -> list[MaybeLabels]:
    source = call.inputs[0]
    call.zero = source.zero and call.cause.operator not in ("aten.fill_", "aten.fill", "aten.bernoulli")
    return list(source.labels)


@rule("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def like(call: Call) -> list[MaybeLabels]:
    return list(call.inputs[0].labels)


@rule(
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.scalar_tensor",
)
def constant(call: Call) -> list[MaybeLabels]:
    """A tensor of one repeated value: any of its dimensions may shrink with what it meets."""
    call.zero = "zeros" in call.cause.operator
    return [call.fresh(size) if size > 1 else None for size in call.shape()]


@rule("aten.arange", "aten.linspace", "aten.rand", "aten.randn", "aten.randint", "aten.eye", "aten.tril_indices")
def values(call: Call) -> list[MaybeLabels]:
    return [None] * len(call.shape())


@rule("aten.copy_")
def copy_(call: Call) -> list[MaybeLabels]:
    target, source = call.inputs[0], call.inputs[1]
    call.zero = target.zero and source.zero
    aligned(call, [target, source], call.shape())
    return list(target.labels)


@rule("aten.where")
def where(call: Call) -> list[MaybeLabels]:
    return aligned(call, [info for info in call.inputs if info.shape], call.shape())


@rule("aten.masked_fill")
def masked_fill(call: Call) -> list[MaybeLabels]:
    return aligned(call, [info for info in call.inputs if info.shape], call.shape())


@rule("aten._prelu_kernel", "aten.prelu")
def prelu(call: Call) -> list[MaybeLabels]:
    x, weight = call.inputs[0], call.inputs[1]
    call.zero = x.zero
    if call.cause.operator == "aten.prelu":
        if weight.shape and weight.shape[0] > 1:
            call.tie(x.labels[1], weight.labels[0])
            call.size_of("num_parameters", x.labels[1])
        return list(x.labels)
    out = aligned(call, [x, weight], call.shape())
    shared = [labels for labels, size in zip(weight.labels, weight.shape, strict=True) if size > 1]
    if shared:
        call.size_of("num_parameters", shared[0])
    return out
