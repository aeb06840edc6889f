"""One file per defect of NNI 3.0; none of them imports torch or NNI before its module is there."""

from nni_plugins.compat.defects import (
    class_wrapper,
    leaf_function,
    lightning_steps,
    mask_files,
    node_is_impure,
    proxy_bytecode,
    slow_import_evaluator,
    slow_import_pandas,
    slow_import_scipy,
    slow_import_version,
    tensor_base,
    tracing_imports,
    transformers_callback,
    transformers_loss,
    transformers_optimizer,
    wrapped_deepcopy,
    wrapper_empty_cache,
)
from nni_plugins.compat.hook import Patch

PATCHES: tuple[Patch, ...] = (
    tensor_base.PATCH,
    node_is_impure.PATCH,
    proxy_bytecode.PATCH,
    leaf_function.PATCH,
    class_wrapper.PATCH,
    tracing_imports.PATCH,
    mask_files.SPEEDUP,
    mask_files.CONFLICT,
    wrapped_deepcopy.PATCH,
    wrapper_empty_cache.PATCH,
    lightning_steps.PATCH,
    transformers_loss.PATCH,
    transformers_optimizer.PATCH,
    transformers_callback.PATCH,
    slow_import_pandas.PATCH,
    slow_import_scipy.PATCH,
    slow_import_version.PATCH,
    slow_import_evaluator.PATCH,
)
