"""Dense weights as files: written without pickle, read from what people have."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.files import write_whole
from nni_plugins.training.errors import CompressionError, first_line

NESTED = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's parameters and buffers as safetensors."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    write_whole(path, lambda part: save_file(state, part))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into a model.

    Parameters
    ----------
    model
        Changed in place.
    path
        safetensors, or a torch file of tensors: a state dict, bare or under the key ``state_dict``, ``model`` ...,
        perhaps with names that DataParallel or torch.compile lengthened. Files that hold other objects are
        refused, since reading them could run code.

    Raises
    ------
    CompressionError
        The file cannot be read, or its names or shapes are not the model's.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CompressionError(f"{path} {what}; model.checkpoint must be a file of trained weights")
    try:
        state = _read(path)
    except (EOFError, pickle.UnpicklingError) as error:
        if "Weights only" not in str(error):
            raise CompressionError(f"{path} cannot be read as weights: it is empty, or was cut off") from error
        raise CompressionError(
            f"{path} cannot be read as weights: it holds more than tensors, which could run code when it is read; "
            "write it by torch.save(model.state_dict(), path), or as safetensors"
        ) from error
    except Exception as error:  # torch and safetensors raise a dozen kinds
        raise CompressionError(f"{path} cannot be read as weights: {first_line(error)}") from error
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = [
        f"{len(names)} {what}, as {names[0]}"
        for names, what in ((missing, "missing"), (extra, "unknown"), (wrong, "of another shape"))
        if names
    ]
    if problems:
        raise CompressionError(f"{path} does not fit the model: of {len(own)} tensors, {'; '.join(problems)}")
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(found, Mapping) and not all(isinstance(value, Tensor) for value in found.values()):
        key = next((name for name in NESTED if isinstance(found.get(name), Mapping)), None)
        if key is None:
            raise ValueError("it holds no state dict")
        found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds {type(found).__name__}, not a state dict")
    return dict(found)
