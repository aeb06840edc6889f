"""What a tensor of the run is known to equal, without its data: zero, or another tensor, reshaped or permuted.

Adding zero changes nothing, a product with zero is zero, a relu leaves alone what is not negative: one small rule for
each operator family, which answers for the first result, and says None where nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from nni_plugins.channels.bounds import Bounds, clamped_to
from nni_plugins.channels.call import Info, Operator
from nni_plugins.channels.rules.elementwise import ZERO_PRESERVING

Step = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Zero:
    """Zero everywhere."""


@dataclass(frozen=True)
class Same:
    """Equal to ``root``, after ``steps``: ('view', shape) and ('permute', dimensions)."""

    root: Info
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.root.shape
        for kind, numbers in self.steps:
            shape = numbers if kind == "view" else tuple(shape[d] for d in numbers)
        return shape

    def viewed(self, shape: tuple[int, ...]) -> Same:
        steps = self.steps[:-1] if self.steps and self.steps[-1][0] == "view" else self.steps
        before = Same(self.root, steps)
        return before if before.shape == shape else Same(self.root, (*steps, ("view", shape)))

    def permuted(self, dims: Iterable[int]) -> Same:
        order = tuple(d % len(self.shape) for d in dims)
        steps = self.steps
        if steps and steps[-1][0] == "permute":
            order, steps = tuple(steps[-1][1][d] for d in order), steps[:-1]
        return Same(self.root, steps if order == tuple(range(len(order))) else (*steps, ("permute", order)))


Value = Zero | Same
ZERO = Zero()


class Known(Protocol):
    """What a rule may ask."""

    def value(self, info: Info) -> Value: ...

    def bounds(self, info: Info) -> Bounds: ...

    def producer(self, info: Info) -> Operator | None: ...


Rule = Callable[[Known, Operator], "Value | None"]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in " ".join(names).split():
            RULES[f"aten.{name}"] = function
        return function

    return register


def results(known: Known, operator: Operator) -> list[Value]:
    """Return what the outputs of ``operator`` equal; themselves, where nothing else is known."""
    name = operator.name.rstrip("_")
    rule = RULES.get(name)
    first = rule(known, operator) if rule is not None else None
    values: list[Value] = [Same(info) for info in operator.outputs]
    if first is not None and values:
        values[0] = first
        if first is ZERO and name in _ALL_OUTPUTS:
            values = [ZERO] * len(values)
    return values


def _zero(known: Known, value: Any) -> bool:
    """Whether a tensor or a number is zero; a tensor that is not there adds nothing."""
    if isinstance(value, Info):
        return known.value(value) is ZERO
    return value is None or (isinstance(value, (int, float)) and value == 0)


def _kept(known: Known, operator: Operator, source: Any) -> Value | None:
    """The result is ``source``, unless it was broadcast or cast on the way."""
    if not isinstance(source, Info):
        return None
    value, out = known.value(source), operator.outputs[0]
    return value if value is ZERO or (source.shape == out.shape and source.dtype == out.dtype) else None


# -- zero in, zero out ---------------------------------------------------------------------------------------------

#: Operators that take a tensor apart.
SPLITS = frozenset(
    f"aten.{name}" for name in "split split_with_sizes chunk unbind unsafe_split unsafe_chunk tensor_split".split()
)
_ALL_OUTPUTS = SPLITS | {"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"}


@_rule(
    *ZERO_PRESERVING,
    "split split_with_sizes chunk unbind unsafe_split unsafe_chunk tensor_split select index index_select gather",
    "repeat tile roll flip rot90 as_strided unfold diagonal diag_embed diagonal_copy triu tril take take_along_dim",
    "pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im glu repeat_interleave select_copy",
    "sum nansum mean amax amin max min cumsum linalg_vector_norm norm std var",
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d",
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d",
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    "grid_sampler grid_sampler_2d grid_sampler_3d reflection_pad1d reflection_pad2d reflection_pad3d",
    "replication_pad1d replication_pad2d replication_pad3d _fft_r2c _fft_c2r _fft_c2c view_as_real view_as_complex",
    "real imag conj _conj embedding embedding_bag _embedding_bag native_dropout",
)
def _of_data(known: Known, operator: Operator) -> Value | None:
    return ZERO if operator.args and _zero(known, operator.args[0]) else None


@_rule("zeros zeros_like new_zeros zero _efficientzerotensor")
def _zeros(known: Known, operator: Operator) -> Value | None:
    return ZERO


@_rule("full new_full full_like fill")
def _filled(known: Known, operator: Operator) -> Value | None:
    position = 2 if operator.name.startswith("aten.new_full") else 1
    return ZERO if _zero(known, operator.argument(position, "fill_value", 1)) else None


@_rule("cat concat concatenate stack hstack vstack")
def _joined(known: Known, operator: Operator) -> Value | None:
    return ZERO if all(_zero(known, part) for part in operator.args[0]) else None


@_rule("where")
def _where(known: Known, operator: Operator) -> Value | None:
    both = len(operator.args) == 3 and all(_zero(known, part) for part in operator.args[1:])
    return ZERO if both else None


@_rule("masked_fill constant_pad_nd")
def _with_constant(known: Known, operator: Operator) -> Value | None:
    constant = operator.argument(2, "value", 0)
    return ZERO if _zero(known, operator.args[0]) and _zero(known, constant) else None


@_rule("pow")
def _power(known: Known, operator: Operator) -> Value | None:
    exponent = operator.args[1]
    return ZERO if _zero(known, operator.args[0]) and isinstance(exponent, (int, float)) and exponent > 0 else None


@_rule("mm bmm mv dot matmul _grouped_mm")
def _product(known: Known, operator: Operator) -> Value | None:
    return ZERO if any(_zero(known, factor) for factor in operator.args[:2]) else None


@_rule("addmm baddbmm addmv addbmm")
def _shifted_product(known: Known, operator: Operator) -> Value | None:
    bias, *factors = operator.args[:3]
    if any(_zero(known, factor) for factor in factors) and operator.kwargs.get("beta", 1) == 1:
        return _kept(known, operator, bias)
    return None


@_rule(
    "convolution linear _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "convolution_overrideable mkldnn_convolution cudnn_convolution",
)
def _layer(known: Known, operator: Operator) -> Value | None:
    nothing = any(_zero(known, factor) for factor in operator.args[:2])
    return ZERO if nothing and _zero(known, operator.argument(2, "bias")) else None


@_rule(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps",
)
def _attention(known: Known, operator: Operator) -> Value | None:
    return ZERO if _zero(known, operator.argument(2, "value", 1)) else None


@_rule("lstm gru rnn_tanh rnn_relu")
def _recurrent(known: Known, operator: Operator) -> Value | None:
    """All weights zero, from a state of zero: gates are half open, on nothing."""
    flat = [item for value in operator.args[1:3] for item in (value if isinstance(value, list) else [value])]
    return ZERO if all(_zero(known, item) for item in flat if isinstance(item, Info)) else None


@_rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update batch_norm",
    "_batch_norm_with_update cudnn_batch_norm miopen_batch_norm native_group_norm",
)
def _norm(known: Known, operator: Operator) -> Value | None:
    return _normalised(known, operator, *(operator.argument(1 + i, name) for i, name in enumerate(_AFFINE)))


@_rule("native_layer_norm layer_norm rms_norm _fused_rms_norm")
def _layer_norm(known: Known, operator: Operator) -> Value | None:
    bias = None if "rms_norm" in operator.name else operator.argument(3, "bias")
    return _normalised(known, operator, operator.argument(2, "weight"), bias)


_AFFINE = ("weight", "bias")


def _normalised(known: Known, operator: Operator, weight: Any, bias: Any) -> Value | None:
    """Nothing is left if the scale is zero; or the input, unless a running mean is subtracted."""
    nothing = isinstance(weight, Info) and _zero(known, weight)
    if "batch_norm" not in operator.name:
        nothing = nothing or _zero(known, operator.args[0])
    return ZERO if nothing and _zero(known, bias) else None


# -- zero added, one multiplied ------------------------------------------------------------------------------------


@_rule("add sub")
def _sum(known: Known, operator: Operator) -> Value | None:
    a, b = operator.args[:2]
    if _zero(known, b):
        return _kept(known, operator, a)
    plain = operator.name.startswith("aten.add") and operator.argument(2, "alpha", 1) == 1
    return _kept(known, operator, b) if plain and _zero(known, a) else None


@_rule("mul")
def _times(known: Known, operator: Operator) -> Value | None:
    a, b = operator.args[:2]
    if _zero(known, a) or _zero(known, b):
        return ZERO
    return _kept(known, operator, a) if isinstance(b, (int, float)) and b == 1 else None


@_rule("div true_divide")
def _over(known: Known, operator: Operator) -> Value | None:
    a, b = operator.args[:2]
    return _kept(known, operator, a) if _zero(known, a) or (isinstance(b, (int, float)) and b == 1) else None


@_rule("addcmul addcdiv")
def _sum_of_product(known: Known, operator: Operator) -> Value | None:
    a, b, c = operator.args[:3]
    nothing = _zero(known, b) or (_zero(known, c) and "mul" in operator.name)
    return _kept(known, operator, a) if nothing else None


@_rule("index_add scatter_add")
def _added_at(known: Known, operator: Operator) -> Value | None:
    return _kept(known, operator, operator.args[0]) if _zero(known, operator.args[3]) else None


@_rule("index_put")
def _put_at(known: Known, operator: Operator) -> Value | None:
    target, places, values = operator.args[:3]
    if operator.argument(3, "accumulate", False):
        return _kept(known, operator, target) if _zero(known, values) else None
    if _zero(known, target) and _zero(known, values):
        return ZERO
    value = known.value(values)
    if isinstance(value, Same) and not value.steps:  # x[i] += y reads x[i], adds, and puts it back
        read = known.producer(value.root)
        if read is not None and read.name == "aten.index" and read.args[0] is target and read.args[1] == places:
            return _kept(known, operator, target)
    return None


_SOURCE = {"aten.index_copy": 3, "aten.scatter": 3, "aten.masked_scatter": 2}


@_rule("index_copy scatter masked_scatter slice_scatter select_scatter")
def _replaced_at(known: Known, operator: Operator) -> Value | None:
    position = _SOURCE.get(operator.name.rstrip("_"), 1)
    source = operator.args[position] if position < len(operator.args) else 1
    return ZERO if _zero(known, operator.args[0]) and _zero(known, source) else None


# -- the same, in another shape ------------------------------------------------------------------------------------


@_rule("clone detach alias contiguous lift_fresh lift_fresh_copy to _to_copy positive dropout expand slice view_as")
def _copied(known: Known, operator: Operator) -> Value | None:
    step = operator.argument(4, "step", 1) if operator.name == "aten.slice" else 1
    return _kept(known, operator, operator.args[0]) if step == 1 or _zero(known, operator.args[0]) else None


@_rule("copy")
def _overwritten(known: Known, operator: Operator) -> Value | None:
    return _kept(known, operator, operator.args[1])


@_rule("view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten")
def _viewed(known: Known, operator: Operator) -> Value | None:
    value, out = known.value(operator.args[0]), operator.outputs[0]
    if isinstance(value, Same):
        return value.viewed(out.shape) if operator.args[0].dtype == out.dtype else None
    return ZERO


@_rule("permute transpose t")
def _permuted(known: Known, operator: Operator) -> Value | None:
    value = known.value(operator.args[0])
    if not isinstance(value, Same):
        return ZERO
    rank = len(operator.outputs[0].shape)
    order = list(range(rank))
    if operator.name == "aten.permute":
        order = list(operator.args[1])
    elif rank > 1:
        a, b = operator.args[1:3] if operator.name.startswith("aten.transpose") else (0, 1)
        order[a], order[b] = order[b], order[a]
    return value.permuted(order)


# -- what an activation leaves alone -------------------------------------------------------------------------------

_RECTIFIERS = "relu leaky_relu elu celu prelu _prelu_kernel abs rrelu_with_noise"


@_rule(_RECTIFIERS)
def _rectified(known: Known, operator: Operator) -> Value | None:
    if _zero(known, operator.args[0]):
        return ZERO
    return _kept(known, operator, operator.args[0]) if known.bounds(operator.args[0])[0] >= 0 else None


@_rule("hardtanh relu6 clamp clamp_min clamp_max")
def _clamped(known: Known, operator: Operator) -> Value | None:
    low, high = clamped_to(operator)
    if _zero(known, operator.args[0]):
        return ZERO if low <= 0 <= high else None
    least, most = known.bounds(operator.args[0])
    return _kept(known, operator, operator.args[0]) if low <= least and most <= high else None
