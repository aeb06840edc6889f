"""Quantise a compact model: fold its norms, find ranges, train under them, and leave scales that an export can use.

The order is that of quantisation-aware pruning: what was pruned is gone or stays zero, norms are folded before any
range is taken, NNI's quantiser is made fresh on that model, and zeros are put back after each of its training steps.
Weights are quantised by output channel and symmetrically, so that zero is exactly zero; activations by tensor, at the
inputs of layers, and at the outputs that a residual addition reads, where an integer kernel needs them.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.training.errors import CompressionError, RecipeError, first_line
from nni_plugins.training.fold_norms import LAYERS, flow, fold_norms
from nni_plugins.training.loaders import apply, split_batch
from nni_plugins.training.loop import Loop, batches_of
from nni_plugins.training.recipe import Recipe

ADDITIONS = ("add", "__add__", "__iadd__", "__radd__", "add_", "sub", "__sub__", "cat", "concat", "mul", "__mul__")
"""Functions whose inputs an integer kernel takes quantised."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CLASSES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")
"""Names of the modules that are quantised."""


@dataclass(frozen=True)
class Grid:
    """How a tensor is quantised: ``scale · (clamp(round(x / scale) + zero, low, high) − zero)``.

    Attributes
    ----------
    scale, zero
        Tensors of one element, or for a weight of one for each output channel.
    axis
        The channel's dimension; None where there is one scale.
    low, high
        Ends of the integers.
    """

    scale: Tensor
    zero: Tensor
    axis: int | None
    low: int
    high: int

    def __call__(self, values: Tensor) -> Tensor:
        """Round to the grid, in float; gradients pass where nothing is cut off."""
        if self.axis is None:
            step, offset = float(self.scale), int(self.zero)
            return torch.fake_quantize_per_tensor_affine(values, step, offset, self.low, self.high)
        scale, zero = self.scale.to(values.device), self.zero.to(values.device, torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scale, zero, self.axis, self.low, self.high)


@dataclass
class Quantized:
    """A quantised model.

    Attributes
    ----------
    model
        Norms folded, weights on their grids (in float), activations rounded while it runs.
    grids
        By module: ``weight``, ``input``, and ``output`` where an addition reads it.
    folded
        The norms that are gone.
    zeros
        By parameter: how many elements were zero before, and are zero in the trained weights.
    """

    model: nn.Module
    grids: dict[str, dict[str, Grid]]
    folded: list[str]
    zeros: dict[str, int] = field(default_factory=dict)

    def plain(self) -> nn.Module:
        """A copy without the rounding of activations: what is exported, with the grids beside it."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Rounding)]:
                    del hooks[key]
        return model


def quantize(recipe: Recipe, compact: nn.Module, loop: Loop) -> Quantized:
    """Quantise a model by the recipe's ``quantize`` section.

    Parameters
    ----------
    recipe
        ``quantize.method``: ``ptq`` looks at batches only; ``qat`` and ``lsq`` train under the grids.
    compact
        Without wrappers; it is not changed.
    loop
        Its training split gives ranges and trains; ``train`` settings are those of the recipe's ``quantize`` section.

    Raises
    ------
    RecipeError, CompressionError
        With one line.
    """
    settings = recipe.quantize
    if settings.method == "lsq" and settings.activations == "affine":
        raise RecipeError("quantize.activations: lsq is symmetric; leave it at auto, or take quantize.method: qat")
    model = copy.deepcopy(compact).eval()
    _keep_to_modules(model)
    example = loop.place(loop.data.example)
    folded = fold_norms(model, example)
    chosen = _layers(model, settings.exclude, trained=settings.method != "ptq")
    outputs = _read_by_additions(model, example, chosen)
    kept = {f"{name}.weight": (layer.weight != 0) for name, layer in chosen.items() if (layer.weight == 0).any()}
    trainer = _trainer(recipe, loop)
    ties = _ties(model)
    calibration = _calibrate(recipe, model, trainer, chosen, outputs, kept)
    for (first, name), *others in ties:  # NNI's wrappers left each a copy
        for module, attribute in others:
            setattr(module, attribute, getattr(first, name))
    grids = {name: _grids(name, layer, calibration.get(name, {})) for name, layer in chosen.items()}
    zeros = _check_zeros(model, kept)
    with torch.no_grad():
        for name, layer in chosen.items():
            layer.weight.copy_(grids[name]["weight"](layer.weight))
            _round_activations(layer, grids[name])
    return Quantized(model.eval(), grids, folded, zeros)


def _keep_to_modules(model: nn.Module) -> None:
    """Turn off torch's fused transformer layers, which read weights and call none of the layers that hold them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


class _Rounding:
    """A hook that rounds what a module gets, or what it returns."""

    def __init__(self, grid: Grid, output: bool) -> None:
        self.grid, self.output = grid, output

    def __call__(self, module: nn.Module, inputs: Any, value: Any) -> Any:
        if self.output:
            return self.grid(value)
        if not inputs:  # given by name
            return inputs, {name: self.grid(item) for name, item in value.items()}
        return (self.grid(inputs[0]), *inputs[1:]), value


def _round_activations(layer: nn.Module, grids: dict[str, Grid]) -> None:
    layer.register_forward_pre_hook(_Rounding(grids["input"], output=False), with_kwargs=True)
    if "output" in grids:
        layer.register_forward_hook(_Rounding(grids["output"], output=True))


def _layers(model: nn.Module, exclude: tuple[str, ...], trained: bool) -> dict[str, Any]:
    """The layers to quantise. In training, NNI's wrappers would take a tied weight apart, so it stays in float."""
    shared = {id(getattr(*holders[0])) for holders in _ties(model)} if trained else set()
    modules = dict(model.named_modules())
    for name in exclude:
        if name not in modules:
            from nni_plugins.training.schema import closest

            raise RecipeError(f"quantize.exclude: the model has no module {name}; {closest(name, list(modules))}")
    found = {
        name: module
        for name, module in modules.items()
        if type(module).__name__ in CLASSES
        and isinstance(module, LAYERS)
        and id(module.weight) not in shared
        and not any(name == out or name.startswith(out + ".") for out in exclude)
    }
    if not found:
        raise CompressionError("quantize: the model has no convolution or linear layer that could be quantised")
    return found


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places, a module and a name each, that hold one parameter together."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                places.setdefault(id(value), []).append((module, name))
    return [holders for holders in places.values() if len(holders) > 1]


def _read_by_additions(model: nn.Module, example: Any, chosen: dict[str, Any]) -> set[str]:
    """Names of the layers whose outputs an addition (or the like) reads as they are."""
    returned, _, readers = flow(model, example, tuple({type(layer) for layer in chosen.values()}))
    names = {layer: name for name, layer in chosen.items()}
    return {
        names[layer]
        for layer, tensor in returned.items()
        if layer in names and any(reader in ADDITIONS for reader in readers.of(tensor))
    }


def _trainer(recipe: Recipe, loop: Loop) -> Loop:
    settings = recipe.quantize
    changed = recipe.with_values(
        {
            "train.epochs": settings.epochs,
            "train.learning_rate": settings.learning_rate,
            "train.warmup_epochs": 0.0,
            "train.channels_last": False,
        }
    )
    return Loop(changed, loop.data, "quantisation")


def _calibrate(
    recipe: Recipe, model: nn.Module, trainer: Loop, chosen: dict[str, Any], outputs: set[str], kept: dict[str, Tensor]
) -> dict[str, Any]:
    """Run NNI's quantiser on the model, which is left unwrapped with its trained weights; return what it found."""
    from nni.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer

    settings = recipe.quantize
    evaluator = _evaluator(trainer, settings.calibrate_batches if settings.method == "ptq" else None)
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for name, layer in chosen.items():
        kinds.setdefault((isinstance(layer, TRANSPOSED), name in outputs), []).append(name)
    entries = [_config(settings, names, *kind) for kind, names in kinds.items()]
    try:
        if settings.method == "ptq":
            quantizer: Any = PtqQuantizer(model, entries, evaluator)
            length: tuple[Any, Any] = (0, None)
        elif settings.method == "qat":
            steps = settings.epochs * batches_of(trainer.data.train)
            start = min(settings.calibrate_batches, steps // 2)  # a short training rounds in its second half, at least
            quantizer = QATQuantizer(model, entries, evaluator, quant_start_step=start)
            length = (None, settings.epochs)
        else:
            quantizer = LsqQuantizer(model, entries, evaluator)
            length = (None, settings.epochs)
        live = {
            f"{module}.{target}": space
            for module, spaces in quantizer._target_spaces.items()
            for target, space in spaces.items()
        }

        @torch.no_grad()
        def put_zeros_back() -> None:
            for name, mask in kept.items():
                live[name].target.mul_(mask)

        evaluator.after_step = put_zeros_back
        model.train()
        try:
            _, calibration = quantizer.compress(*length)
        except TypeError:  # NNI unpacks the range of each layer, and some have none
            _check_ranges(quantizer._target_spaces)
            raise
        _check_ranges(quantizer._target_spaces)
        quantizer.unwrap_model()
    except CompressionError:
        raise
    except (ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise CompressionError(f"quantize ({settings.method}): {first_line(error)}") from error
    model.eval()
    return calibration


def _check_ranges(spaces: dict[str, dict[str, Any]]) -> None:
    """Raise where NNI saw nothing of a layer."""
    for name, targets in spaces.items():
        for target in targets.values():
            if target.scale is None or target.zero_point is None:
                raise CompressionError(
                    f"quantize: {name} never ran, so that it has no range; name it in quantize.exclude"
                )


def _evaluator(trainer: Loop, batches: int | None) -> Any:
    """NNI's evaluator; with a number of batches one that only looks at so many of the training split."""
    from nni_plugins.training.evaluator import RecipeEvaluator

    class Looking(RecipeEvaluator):
        def _train(self, *args: Any, **kwargs: Any) -> None:
            pass  # NNI's PTQ trains first, which would change the weights

        @torch.no_grad()
        def _evaluate(self, model: nn.Module) -> dict[str, float]:
            model.eval()
            if hasattr(trainer.data.train, "set_epoch"):  # always the same batches
                trainer.data.train.set_epoch(0)
            for batch in islice(trainer.data.train, batches):
                apply(model, split_batch(trainer.place(batch))[0])
            return {"default": 0.0}

    return RecipeEvaluator(trainer) if batches is None else Looking(trainer)


def _config(settings: Any, names: list[str], transposed: bool, output: bool) -> dict[str, Any]:
    """NNI's configuration of some layers; its output channels are dimension 0, which those of a transposed are not."""
    affine = settings.activations == "affine" or (settings.activations == "auto" and settings.method != "lsq")
    activation = {
        "quant_dtype": f"{'uint' if affine else 'int'}{settings.activation_bits}",
        "quant_scheme": "affine" if affine else "symmetric",
        "granularity": "default",
    }
    weight = {
        "quant_dtype": f"int{settings.weight_bits}",
        "quant_scheme": "symmetric",
        "granularity": "default" if transposed else "out_channel",
    }
    targets = {"weight": weight, "_input_": activation, **({"_output_": dict(activation)} if output else {})}
    return {
        "op_names": names,
        "target_names": list(targets),
        "quant_dtype": f"int{settings.weight_bits}",
        "target_settings": targets,
    }


def _grids(name: str, layer: nn.Module, found: dict[str, Any]) -> dict[str, Grid]:
    grids = {}
    for target, values in found.items():
        kind = "weight" if target == "weight" else "input" if target.startswith("_input_") else "output"
        bits = int(values["quant_bits"])
        unsigned = str(values["quant_dtype"]).startswith("uint")
        low, high = (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        scale = values["scale"].detach().float().flatten().cpu()
        zero = values["zero_point"].detach().float().flatten().cpu().round().to(torch.int32)
        if scale.numel() > 1 and kind != "weight":
            raise CompressionError(f"quantize: {name} has {scale.numel()} scales for its {kind}; one was expected")
        axis = None if kind != "weight" or isinstance(layer, TRANSPOSED) else 0
        if not torch.isfinite(scale).all() or (scale <= 0).any():
            raise CompressionError(f"quantize: {name} has no range for its {kind}; raise quantize.calibrate_batches")
        grids[kind] = Grid(scale, zero, axis, low, high)
    missing = {"weight", "input"} - set(grids)
    if missing:
        raise CompressionError(f"quantize: {name} never ran, so that it has no range; name it in quantize.exclude")
    return grids


def _check_zeros(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, int]:
    """Raise where a pruned weight came back; return how many are zero in each parameter."""
    parameters = dict(model.named_parameters())
    counts = {}
    for name, mask in kept.items():
        back = int((parameters[name].detach()[~mask] != 0).sum())
        if back:
            raise CompressionError(f"quantize: {back} pruned weights of {name} came back; please report this model")
        counts[name] = int((~mask).sum())
    return counts


def settings_of(grids: dict[str, dict[str, Grid]]) -> dict[str, Any]:
    """Return grids as plain data, for JSON."""
    return {
        name: {
            kind: {**dataclasses.asdict(grid), "scale": grid.scale.tolist(), "zero": grid.zero.tolist()}
            for kind, grid in kinds.items()
        }
        for name, kinds in grids.items()
    }
