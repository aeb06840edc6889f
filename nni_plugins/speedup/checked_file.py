"""A safetensors file with a checksum: written whole or not at all, and read back only if nothing is amiss. No pickle.

What it holds is its caller's business. Nothing but torch and safetensors is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CompactFileError(ValueError):
    """A file that is not what it should be, is damaged, or does not fit the model that it is loaded into."""


def write_checked(path: Path, tensors: dict[str, Tensor], text: Mapping[str, str]) -> None:
    """Write tensors, and text with its ``format`` and ``version``; folders are made."""
    text = dict(text)
    pairs = [key for key, tensor in tensors.items() if tensor.is_complex()]
    if pairs:  # safetensors knows some kinds only
        tensors = {key: torch.view_as_real(t.resolve_conj()) if key in pairs else t for key, t in tensors.items()}
        text["complex"] = json.dumps(pairs)
    text["checksum"] = _checksum(tensors, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=text)
    partial.replace(path)


def read_checked(
    path: Path, kind: str, format: str, versions: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_checked` wrote.

    Parameters
    ----------
    path
        The file.
    kind
        What it should hold, for messages: ``a compact model``.
    format
        The format's name.
    versions
        The format's versions that can be read, oldest first.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CompactFileError
        In one line, if it is damaged, or something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = file.metadata() or {}
            if text.get("format") != format:
                raise CompactFileError(f"{path}: a safetensors file, but not {kind} of nni-plugins")
            if text.get("version") not in versions:
                newest = list(versions)[-1]
                raise CompactFileError(f"{path}: format version {text.get('version')}; this release reads {newest}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CompactFileError(f"{path}: damaged, or not {kind}: {str(error).splitlines()[0]}") from None
    checksum = text.pop("checksum", "")
    if checksum != _checksum(tensors, text):
        raise CompactFileError(f"{path}: damaged: its content does not match its checksum")
    for key in json.loads(text.pop("complex", "[]")):
        tensors[key] = torch.view_as_complex(tensors[key])
    return tensors, text


def _checksum(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(text):
        digest.update(f"{key}={text[key]}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}\n".encode())
        size = tensor.numel() * tensor.element_size()
        if size:
            digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def pack_bits(flat: Tensor) -> Tensor:
    """Truth values [n] as uint8 [⌈n/8⌉], the first one lowest."""
    bits = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8)
    bits[: flat.numel()] = flat
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """What :func:`pack_bits` packed: bool [count]."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:count].bool()
