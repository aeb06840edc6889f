"""Save and load sparse weights: what is left of each tensor and where it lies, in one safetensors file, no pickle.

For masks that no removal of channels makes small: single weights, N:M patterns, whole kernels. Each tensor is stored in
the smallest of these forms:

- ``dense``: as it is
- ``bits``: the values left, and one bit for every entry (N:M patterns cost as much as hardware's own metadata)
- ``gaps``: the values left, and the distance of each from the one before, in 1, 2 or 4 bytes
- ``kernels``: the kernels left, and one bit for every kernel
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nni_plugins.speedup.checked_file import (
    CompactFileError,
    pack_bits,
    read_checked,
    unpack_bits,
    write_checked,
)

FORMAT = "nni-plugins sparse weights"
VERSION = 1
Masks = Mapping[str, Mapping[str, Any]]
_WRAPPER = "_nni_wrapper."
_PARTS = {"bits": "bits/", "gaps": "gaps/", "kernels": "bits/"}


class StoredTensor(NamedTuple):
    """How one tensor is stored: the form, the fraction of its entries that is left, its bytes before and after."""

    form: str
    density: float
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class SparseFile:
    """What :func:`save_sparse` wrote, or what it would write.

    Attributes
    ----------
    path
        The file; None where none was written.
    bytes
        Of all tensors as stored; the file has a header besides.
    dense_bytes
        Of all tensors without sparse storage.
    tensors
        By name.
    """

    path: Path | None
    bytes: int
    dense_bytes: int
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


class SparseState(NamedTuple):
    """What :func:`load_sparse` read: dense tensors by name, and NNI's masks."""

    state: dict[str, Tensor]
    masks: dict[str, dict[str, Tensor]]


def save_sparse(model_or_state: nn.Module | Mapping[str, Tensor], masks: Masks | None, path: str | Path) -> SparseFile:
    """Save the weights of a model, what is masked left out.

    Parameters
    ----------
    model_or_state
        A model, with NNI's wrappers on or off, compact or not, or its ``state_dict()``.
    masks
        NNI's ``{module: {parameter: mask}}``; None for those of the wrappers, and where there are none, for the zeros
        of the weights.
    path
        Where to. The file appears whole or not at all.

    Returns
    -------
    SparseFile
        Bytes, in total and of each tensor.

    Raises
    ------
    ValueError
        A mask names no tensor, or has another shape.
    """
    stored, text, report = _encode(model_or_state, masks)
    path = Path(path)
    write_checked(path, stored, text)
    return SparseFile(path, report.bytes, report.dense_bytes, report.tensors)


def sparse_bytes(model_or_state: nn.Module | Mapping[str, Tensor], masks: Masks | None = None) -> SparseFile:
    """Say what :func:`save_sparse` would store, without writing it."""
    return _encode(model_or_state, masks)[2]


def load_sparse(path: str | Path, model: nn.Module | None = None, *, device: Any = "cpu") -> SparseState:
    """Read what :func:`save_sparse` wrote, to the last bit; what was masked is 0.

    Parameters
    ----------
    path
        A file of :func:`save_sparse`.
    model
        Filled with the weights, if given; of the shapes of the saved one, and without wrappers.
    device
        Where the tensors go.

    Returns
    -------
    SparseState
        ``state``, dense tensors for ``load_state_dict``, and ``masks``, NNI's.

    Raises
    ------
    CompactFileError
        In one line, if the file is damaged or foreign, or does not fit the model.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    tensors, text = read_checked(path, "sparse weights", FORMAT, [str(VERSION)])
    state: dict[str, Tensor] = {}
    alive: dict[str, Tensor] = {}
    for name, entry in json.loads(text["tensors"]).items():
        state[name], alive[name] = (part.to(device) for part in _decode(tensors, name, entry))
    for name, first in json.loads(text["aliases"]).items():
        state[name], alive[name] = state[first], alive[first]
    masks = {
        module: {
            target: alive[f"{module}.{target}" if module else target].to(
                state[f"{module}.{target}" if module else target]
            )
            for target in targets
        }
        for module, targets in json.loads(text["masks"]).items()
    }
    if model is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first_line = " ".join(str(error).split())
            raise CompactFileError(f"{path}: it does not fit the model: {first_line}") from None
    return SparseState(state, masks)


# -- writing ------------------------------------------------------------------------------------------------------


def plain_state(
    model_or_state: nn.Module | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors of a model by their names without NNI's wrappers, and the wrappers' masks.

    Tensors are not yet masked; a wrapper's masked product is left out.
    """
    if isinstance(model_or_state, nn.Module):
        model_or_state = model_or_state.state_dict(keep_vars=True)
    state = {name: t for name, t in model_or_state.items() if isinstance(t, Tensor)}
    held = {name: name.replace(_WRAPPER, "") for name in state if _WRAPPER in name}
    plain: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        short = held.get(name)
        if short is None:
            if name not in held.values():  # else it is the product that a wrapper has left there
                plain[name] = tensor
        elif name.endswith("_mask") and name.removesuffix("_mask") in state:
            module, _, target = short.removesuffix("_mask").rpartition(".")
            masks.setdefault(module, {})[target] = tensor
        else:
            plain[short] = tensor
    return plain, masks


def _encode(
    model_or_state: nn.Module | Mapping[str, Tensor], masks: Masks | None
) -> tuple[dict[str, Tensor], dict[str, str], SparseFile]:
    plain, own = plain_state(model_or_state)
    masks = own if masks is None else masks
    named = {
        f"{module}.{target}" if module else target: mask
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None and not target.startswith(("_input", "_output"))
    }
    for name, mask in named.items():
        if name not in plain:
            raise ValueError(f"masks: {name} is no tensor of the model")
        if mask.shape != plain[name].shape:
            raise ValueError(f"masks: {name} has shape {list(plain[name].shape)}, its mask {list(mask.shape)}")
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    report: dict[str, StoredTensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in plain.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        same = (place, name in named)
        if same in first and _equal_masks(named.get(name), named.get(first[same])):
            aliases[name] = first[same]
            continue
        first[same] = name
        parts, form, density = _smallest(tensor.detach().cpu().contiguous(), named.get(name))
        for prefix, part in parts.items():
            stored[prefix + name] = part.contiguous().clone()
        entries[name] = {"form": form, "shape": list(tensor.shape)}
        size = sum(part.numel() * part.element_size() for part in parts.values())
        report[name] = StoredTensor(form, density, tensor.numel() * tensor.element_size(), size)
    text = {
        "format": FORMAT,
        "version": str(VERSION),
        "tensors": json.dumps(entries),
        "aliases": json.dumps(aliases),
        "masks": json.dumps({m: [t for t in ts if (f"{m}.{t}" if m else t) in named] for m, ts in masks.items()}),
    }
    total = SparseFile(
        None, sum(t.bytes for t in report.values()), sum(t.dense_bytes for t in report.values()), report
    )  # fmt: skip
    return stored, text, total


def _equal_masks(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or other is None or torch.equal(one != 0, other != 0))


def _smallest(tensor: Tensor, mask: Tensor | None) -> tuple[dict[str, Tensor], str, float]:
    """The smallest form of a tensor: what to store by prefix, the form's name, and the density."""
    if mask is not None:
        alive = mask.detach().cpu().ne(0)
    elif tensor.is_floating_point() and tensor.element_size() > 1:
        alive = tensor.ne(0) | torch.signbit(tensor)  # a negative zero is kept
    else:
        return {"": tensor}, "dense", 1.0
    flat, values = alive.flatten(), tensor.flatten()[alive.flatten()]
    density = len(values) / max(tensor.numel(), 1)
    forms: dict[str, dict[str, Tensor]] = {}
    if mask is None or bool(flat.all()):  # a masked tensor must say which of its zeros are masked
        forms["dense"] = {"": tensor}
    forms["bits"] = {"": values, "bits/": pack_bits(flat)}
    forms["gaps"] = {"": values, "gaps/": _gaps(flat)}
    if tensor.dim() > 2:
        kernels = alive.flatten(2)
        if torch.equal(kernels.any(2), kernels.all(2)):
            forms["kernels"] = {"": values, "bits/": pack_bits(kernels.any(2).flatten())}
    sizes = {form: sum(p.numel() * p.element_size() for p in parts.values()) for form, parts in forms.items()}
    form = min(sizes, key=sizes.__getitem__)
    return forms[form], form, density


def _gaps(flat: Tensor) -> Tensor:
    """How many entries lie between each that is left and the one before, in the smallest integers that hold them."""
    where = flat.nonzero().flatten()
    gaps = torch.diff(where, prepend=torch.tensor([-1])) - 1
    most = int(gaps.max()) if len(gaps) else 0
    kind = next(k for k in (torch.uint8, torch.int16, torch.int32, torch.int64) if most <= torch.iinfo(k).max)
    return gaps.to(kind)


# -- reading ------------------------------------------------------------------------------------------------------


def _decode(tensors: Mapping[str, Tensor], name: str, entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A tensor, and where it is not masked (bool, of its shape)."""
    values, form, shape = tensors[name], entry["form"], entry["shape"]
    if form == "dense":
        return values, torch.ones(shape, dtype=torch.bool)
    out = torch.zeros(shape, dtype=values.dtype)
    where = tensors[_PARTS[form] + name]
    if form == "gaps":
        alive = torch.zeros(out.numel(), dtype=torch.bool)
        alive[(where.to(torch.int64) + 1).cumsum(0) - 1] = True
    elif form == "kernels":
        width = out[0, 0].numel()
        alive = unpack_bits(where, shape[0] * shape[1]).repeat_interleave(width)
    else:
        alive = unpack_bits(where, out.numel())
    out.view(-1)[alive] = values
    return out, alive.view(shape)
