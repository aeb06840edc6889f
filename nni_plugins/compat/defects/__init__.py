"""One file per defect of NNI 3.0; none of them imports torch or NNI before its module is there."""

from nni_plugins.compat.defects import node_is_impure, proxy_bytecode, tensor_base
from nni_plugins.compat.hook import Patch

PATCHES: tuple[Patch, ...] = (
    tensor_base.PATCH,
    node_is_impure.PATCH,
    proxy_bytecode.PATCH,
)
