"""What was measured on this machine before, in one file per machine, safe under trials that run at the same time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: Counts up when times taken before are no longer comparable.
FORMAT = 1

_logger = logging.getLogger(__name__)


Time = float | list[float] | None


def cache_folder() -> Path:
    """Return where measurements are kept: ``NNI_PLUGINS_CACHE``, or ``~/.cache/nni-plugins``."""
    named = os.environ.get("NNI_PLUGINS_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "nni-plugins"


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Return what decides how long an operator takes, beside the operator itself."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "device": device.type,
        "torch": torch.__version__,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["processor"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version() if torch.backends.cudnn.enabled else None
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["cudnn_tf32"] = torch.backends.cudnn.allow_tf32
    else:
        found["processor"] = processor()
        found["cores"] = os.cpu_count()
        found["threads"] = threads
        found["mkldnn"] = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return found


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Cache:
    """Times by signature, in milliseconds, of one machine.

    Parameters
    ----------
    folder
        Where the file lies; None keeps nothing.
    key
        Of :func:`machine`.
    fresh
        Begin with nothing, and replace what the file has.

    Attributes
    ----------
    taken
        How many times were noted.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], fresh: bool = False) -> None:
        self.machine = dict(key)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"latency-{digest}.json"
        self._new: dict[str, Time] = {}
        self._warned = False
        self.taken = 0
        self._fresh = fresh
        self._times = {} if fresh else self._read()

    def __contains__(self, signature: str) -> bool:
        return signature in self._times

    def __len__(self) -> int:
        return len(self._times)

    def get(self, signature: str) -> float | None:
        """Return a time; None where there is none, or where the call failed."""
        found = self._times.get(signature)
        return found if isinstance(found, float) else None

    def get_list(self, signature: str, length: int) -> list[float] | None:
        """Return so many times, or None where they are not known."""
        found = self._times.get(signature)
        return found if isinstance(found, list) and len(found) == length else None

    def put(self, signature: str, milliseconds: Time) -> None:
        """Note a time; None for a call that failed. :meth:`save` writes it."""
        self.taken += 1
        self._times[signature] = self._new[signature] = milliseconds

    def save(self) -> None:
        """Add what is new to the file, under a lock: others may have written meanwhile, and what they wrote stays."""
        if self.path is None or not self._new:
            return
        from filelock import FileLock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=60):
                kept = self._read()
                self._write({**kept, **self._new} if self._fresh else {**self._new, **kept})
            self._new = {}
        except (OSError, TimeoutError) as error:  # a lost measurement is no reason to fail
            self._warn(f"measured latencies cannot be kept in {self.path} ({error}); they are measured again next time")

    def _read(self) -> dict[str, Time]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"{self.path} cannot be read ({error}); latencies are measured again")
            return {}
        times = found.get("milliseconds") if isinstance(found, dict) else None
        if not isinstance(times, dict) or found.get("machine") != self.machine:
            self._warn(f"{self.path} is not a table of this machine's latencies; they are measured again")
            return {}
        return {str(key): value for key, value in times.items() if value is None or _is_time(value)}

    def _write(self, times: Mapping[str, Time]) -> None:
        assert self.path is not None
        text = json.dumps({"machine": self.machine, "milliseconds": times}, separators=(",", ":"))
        handle, part = tempfile.mkstemp(prefix=self.path.name, suffix=".part", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(part, self.path)
        except BaseException:
            os.unlink(part)
            raise

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _logger.warning("%s", text)


def _is_time(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_time, value))
    return isinstance(value, float) and 0 <= value < float("inf")
