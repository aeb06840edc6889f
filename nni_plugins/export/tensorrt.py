"""Whether TensorRT can take an ONNX file: operators, and where quantisation stands, by its documented rules.

Nothing is run here: there is no GPU to run it on. The rules are those of TensorRT's developer guide on explicit
quantisation and of the onnx-tensorrt parser's table of operators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import require

OPERATORS = frozenset(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum
    Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
    Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample
    Where Xor""".split()
)
"""What the parser takes, of ONNX's default domain."""


def check_tensorrt(path: str | Path) -> dict[str, Any]:
    """Check a file against TensorRT's rules.

    Parameters
    ----------
    path
        An ONNX file, float or quantised.

    Returns
    -------
    dict
        ``command``: the ``trtexec`` line. ``run``: False, since it was not run. ``sparse_2_4``: weights that have two
        zeros in every four along their input, which sparse tensor cores use.

    Raises
    ------
    ExportError
        An operator, a type or a placement that TensorRT does not take.
    """
    require("onnx")
    import onnx
    from onnx import numpy_helper

    path = Path(path)
    graph = onnx.load(str(path)).graph
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            where = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise ExportError(f"{path.name}: TensorRT has no {where} ({node.name})")
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    quantised = False
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        quantised = True
        zero = stored.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and (str(zero.dtype) != "int8" or zero.any()):
            raise ExportError(
                f"{path.name}: TensorRT takes int8 around 0, and {node.name} has {zero.dtype} with a zero point; "
                "set quantize.activations: symmetric"
            )
    flags = [f"--onnx={path.name}", f"--saveEngine={path.stem}.engine"]
    flags += ["--int8", "--fp16"] if quantised else ["--fp16"]
    sparse = sorted(name for name, values in stored.items() if two_of_four(values))
    if sparse:
        flags.append("--sparsity=enable")
    if any(not item.dim_value for one in graph.input for item in one.type.tensor_type.shape.dim[:1]):
        for flag, batch in (("minShapes", 1), ("optShapes", 8), ("maxShapes", 32)):
            flags.append(f"--{flag}=" + ",".join(f"{one.name}:{_shape(one, batch)}" for one in graph.input))
    return {"command": " ".join(["trtexec", *flags]), "run": False, "sparse_2_4": sparse}


def two_of_four(values: Any) -> bool:
    """Whether a weight has at least two zeros in every four along its input (dimension 1), and not only zeros."""
    if values.ndim < 2 or values.shape[1] % 4 or not values.any():
        return False
    rows = values.reshape(values.shape[0], values.shape[1] // 4, 4, -1)
    return bool(((rows == 0).sum(axis=2) >= 2).all())


def _shape(item: Any, batch: int) -> str:
    sizes = [dim.dim_value for dim in item.type.tensor_type.shape.dim]
    return "x".join(str(size or batch) for size in sizes)
