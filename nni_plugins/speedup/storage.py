"""Save and load a compact model: weights and plan in one safetensors file, no pickle; loading needs no NNI.

The file holds the tensors by name, the kept indices of every dimension that shrank (``plan/…``), and as text: the
shapes of the model that it was made from, the attributes that changed, and a checksum. Tensors with many zeros are
stored as their nonzero values and a bitmask, where that is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.preserve import drop_caches, set_mode
from nni_plugins.speedup.checked_file import CompactFileError, pack_bits, read_checked, unpack_bits, write_checked
from nni_plugins.speedup.record import record_of, restore

FORMAT = "nni-plugins compact model"
VERSION = 3
_READS = ("1", "2", "3")  # 1 had no modules with a forward of flexible width, 2 none that were removed
_PLAN = "plan/"
_BITS = "bits/"


@dataclass(frozen=True)
class SavedFile:
    """What :func:`save_compact` wrote.

    Attributes
    ----------
    path
        The file.
    bytes
        Its size.
    dense_bytes
        What the tensors would take without sparse storage.
    sparse
        Names of the tensors that are stored sparse, with their densities.
    """

    path: Path
    bytes: int
    dense_bytes: int
    sparse: dict[str, float]


def save_compact(compact: nn.Module, path: str | Path) -> SavedFile:
    """Save a compact model's weights and plan.

    Parameters
    ----------
    compact
        What ``ModelSpeedup.speedup_model()`` returned, trained further or not.
    path
        Where to. The file appears whole or not at all.

    Returns
    -------
    SavedFile
        Sizes in bytes, and what was stored sparse.

    Raises
    ------
    CompactFileError
        If the model was not made by ``ModelSpeedup``, or its shapes were changed afterwards.
    """
    path = Path(path)
    record = record_of(compact)
    if record is None:
        raise CompactFileError(
            f"{path}: this model was not made by nni_plugins.speedup.ModelSpeedup, so it has no plan"
        )
    _check_against_record(compact, record, path)
    tensors: dict[str, torch.Tensor] = {}
    sparse: dict[str, list[int]] = {}
    density: dict[str, float] = {}
    dense_bytes = 0
    for name, tensor in _state(compact).items():
        tensor = tensor.detach().cpu().contiguous()
        dense_bytes += tensor.numel() * tensor.element_size()
        packed = _pack(tensor)
        if packed is None:
            tensors[name] = tensor.clone()
        else:
            tensors[name], tensors[_BITS + name] = packed
            sparse[name] = list(tensor.shape)
            density[name] = packed[0].numel() / tensor.numel()
    for name, dims in record["slices"].items():
        for dim, kept in dims.items():
            tensors[f"{_PLAN}{name}/{dim}"] = kept.to(torch.int32)
    text = {
        "format": FORMAT,
        "version": str(VERSION),
        "shapes": json.dumps(record["shapes"]),
        "sizes": json.dumps(record["sizes"]),
        "added": json.dumps(record["added"]),
        "flexible": json.dumps(record["flexible"]),
        "blocks": json.dumps(record["blocks"]),
        "sparse": json.dumps(sparse),
    }
    write_checked(path, tensors, text)
    return SavedFile(path, path.stat().st_size, dense_bytes, density)


def load_compact(path: str | Path, build_model: Callable[[], nn.Module], *, device: Any = "cpu") -> nn.Module:
    """Build the model afresh, take out what the plan says, and load the weights. Needs torch and safetensors only.

    Parameters
    ----------
    path
        A file of :func:`save_compact`.
    build_model
        Returns the model that was compressed, at its full size; its weights do not matter.
    device
        Where the tensors go.

    Returns
    -------
    torch.nn.Module
        The compact model, in eval mode.

    Raises
    ------
    CompactFileError
        In one line, if the file is damaged or foreign, or ``build_model`` gives another model than it was made from.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    tensors, text = read_checked(path, "a compact model", FORMAT, _READS)
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    model = build_model()
    shapes = json.loads(text["shapes"])
    _check_builder(model, shapes, path)
    slices: dict[str, dict[int, torch.Tensor]] = {}
    for key in [key for key in tensors if key.startswith(_PLAN)]:
        name, _, dim = key.removeprefix(_PLAN).rpartition("/")
        slices.setdefault(name, {})[int(dim)] = tensors.pop(key).to(torch.int64)
    sparse = json.loads(text["sparse"])
    state = {
        name: _unpack(tensor, tensors[_BITS + name], sparse[name]) if name in sparse else tensor
        for name, tensor in tensors.items()
        if not name.startswith(_BITS)
    }
    record = {key: json.loads(text.get(key, "[]")) for key in ("sizes", "added", "flexible")}
    record["blocks"] = json.loads(text.get("blocks", "{}"))
    restore(model, {"slices": slices, "shapes": shapes, **record})
    _fill(model.to(device), state, path)
    drop_caches(model)
    set_mode(model, False)
    return model


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state, each once, however many names it has."""
    seen: set[int] = set()
    out = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            out[name] = value
    return out


def _check_against_record(model: nn.Module, record: dict[str, Any], path: Path) -> None:
    for name, tensor in _state(model).items():
        shape = record["shapes"].get(name)
        if shape is None:
            if name not in record["added"]:
                raise CompactFileError(f"{path}: {name} came into the model after its speedup; it cannot be saved")
            continue
        wanted = [len(record["slices"].get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape)]
        if list(tensor.shape) != wanted:
            raise CompactFileError(f"{path}: {name} has shape {list(tensor.shape)}, its plan says {wanted}")


def _check_builder(model: nn.Module, shapes: dict[str, list[int]], path: Path) -> None:
    built = {name: list(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, shape in shapes.items():
        if name not in built:
            raise CompactFileError(f"{path}: it was made from a model with {name}, which build_model() does not give")
        if built[name] != shape:
            raise CompactFileError(
                f"{path}: build_model() gives {name} of shape {built[name]}; it was made from {shape}"
            )
    for name in built:
        if name not in shapes:
            raise CompactFileError(f"{path}: build_model() gives {name}, which it was not made from")


def _fill(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    targets = _state(model)
    missing = sorted(set(targets) - set(state))
    foreign = sorted(set(state) - set(targets))
    if missing or foreign:
        what = f"it lacks {missing[0]}" if missing else f"it holds {foreign[0]}, which the model does not have"
        raise CompactFileError(f"{path}: it does not fit the model: {what}")
    for name, tensor in state.items():
        target = targets[name]
        if target.shape != tensor.shape:
            raise CompactFileError(f"{path}: {name} has shape {list(tensor.shape)}, the plan says {list(target.shape)}")
        if target.dtype == tensor.dtype:
            target.data.copy_(tensor)
        else:
            target.data = tensor.clone()


def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the nonzero values and a bitmask (8 entries a byte, first entry lowest), where that is smaller."""
    if not tensor.is_floating_point() or tensor.numel() < 64:
        return None
    flat = tensor.flatten()
    alive = flat != 0
    packed = pack_bits(alive)
    if (int(alive.sum()) - tensor.numel()) * tensor.element_size() + len(packed) >= 0:
        return None
    return flat[alive].clone(), packed


def _unpack(values: torch.Tensor, packed: torch.Tensor, shape: list[int]) -> torch.Tensor:
    out = torch.zeros(shape, dtype=values.dtype, device=values.device)
    out.view(-1)[unpack_bits(packed, out.numel())] = values
    return out
