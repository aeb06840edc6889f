"""Time calls of operators alone, in the state in which a run would find them: inputs just written, weights not."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nni_plugins.channels.call import output_tensors
from nni_plugins.channels.latency.operators import Operand, key_of, operands, replace_operands
from nni_plugins.channels.preserve import preserved, random_state_kept
from nni_plugins.channels.watch import as_arguments, run_recorded


class Variant(NamedTuple):
    """A call, with operands in place of tensors; ``cold`` where a run would find the weights in memory only."""

    func: Any
    args: tuple
    kwargs: dict
    cold: bool

    @property
    def key(self) -> str:
        """The signature by which its time is kept."""
        return ("cold " if self.cold else "") + key_of(self.func, self.args, self.kwargs)


_ALIGNED = 64  # elements between two tensors of the pool
_CALLS = 8  # between two events on a GPU: one alone would be the time of its launch
_LEAST_MS = 1e-5
_MMAP = 31 << 20  # the largest block that malloc may take to its heap


class _Stopwatch(TorchDispatchMode):
    """Times each operator that passes through."""

    def __init__(self, stopped: Callable[[Callable[[], Any]], float]) -> None:
        super().__init__()
        self._stopped = stopped
        self._last = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out: list[Any] = []
        self._last = self._stopped(lambda: out.append(func(*args, **(kwargs or {}))))
        return out[0]

    def note(self, out: Any, times: list[float]) -> None:
        """Add the time of the last operator, unless it returned no tensor."""
        if output_tensors(out):
            times.append(self._last)


# As in watch.py: torch wraps each mode for its compiler, whose import takes seconds.
_Stopwatch.__torch_dispatch__ = inspect.unwrap(_Stopwatch.__torch_dispatch__)  # type: ignore[method-assign]


@dataclass
class _Prepared:
    func: Any
    arguments: list[tuple[tuple, dict]]  # copies whose weights lie in different places
    warm: list[tuple[torch.Tensor, torch.Tensor]]


class Clock:
    """Times calls on one device.

    Parameters
    ----------
    device
        Where operators run.
    threads
        CPU threads of a call. With one, the time is the thread's CPU time, so that what else the machine does counts
        little; with more it is the time on the wall; on a GPU it is that between two events.

    Attributes
    ----------
    call_ms
        What a call from Python takes (:meth:`time_call`): no part of any operator's time.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.threads = threads
        self._pools: dict[torch.dtype, torch.Tensor] = {}
        self.call_ms = 0.0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Set the threads, grow malloc's heap to what a running model has, and put the random state back at the end."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with random_state_kept(), torch.no_grad():
                if self.device.type == "cpu":
                    for _ in range(2):
                        torch.empty(_MMAP, dtype=torch.uint8).fill_(0)
                yield
        finally:
            torch.set_num_threads(before)

    def time(self, variants: Sequence[Variant], seconds: float, low: int = 3, high: int = 25) -> list[float | None]:
        """Return the median of each variant's times, in milliseconds; None where it cannot be called.

        Variants take turns, so that a disturbance meets all of them. At least ``low`` turns are taken, and no new one
        after ``seconds``, or after ``high``.
        """
        prepared = [self._prepare(variant) for variant in variants]
        times: list[list[float]] = [[] for _ in variants]
        for index, one in enumerate(prepared):
            if one is not None and not self._try(one):
                prepared[index] = None
        end = time.perf_counter() + seconds
        for turn in range(high):
            if turn >= low and time.perf_counter() > end:
                break
            for one, found in zip(prepared, times, strict=True):
                if one is not None:
                    found.append(self._once(one, turn))
        return [self._net(found) if found else None for found in times]

    def time_call(self) -> float:
        """Return the milliseconds of calling, from Python, an operator that does nothing; 0 where calls do not wait."""
        if self.device.type != "cpu":
            return 0.0
        tensor, nothing = torch.empty(1), torch.ops.aten.detach.default
        with self.ready():
            return 1000 * typical([self._stopped(lambda: nothing(tensor)) for _ in range(300)])

    def time_model(
        self, model: nn.Module, dummy_input: Any, seconds: float, low: int = 5, high: int = 30
    ) -> tuple[float, list[float]]:
        """Return the time of a model's run, and of each operator within it, in milliseconds.

        Runs as they are, each after one that does not count, and runs in which operators are timed take turns.
        """
        args, kwargs = as_arguments(dummy_input)
        whole: list[float] = []
        parts: list[list[float]] = []
        end = time.perf_counter() + seconds
        with preserved(model):
            model.eval()
            for turn in range(-2, high):  # the first two warm up
                if turn >= low and time.perf_counter() > end:
                    break
                model(*args, **kwargs)  # the other kind of run left the caches in another state
                took = self._stopped(lambda: model(*args, **kwargs))
                stopwatch = _Stopwatch(self._stopped)
                times: list[float] = []
                with stopwatch:
                    run_recorded(model, dummy_input, lambda *call: stopwatch.note(call[3], times), data="real")  # noqa: B023
                if turn >= 0:
                    whole.append(took)
                    parts.append(times)
        return 1000 * typical(whole), [self._net(times) for times in zip(*parts, strict=True)]

    def _net(self, times: Sequence[float]) -> float:
        return max(1000 * typical(times) - self.call_ms, _LEAST_MS)

    def release(self) -> None:
        """Free the memory that operands lay in."""
        self._pools.clear()

    def _prepare(self, variant: Variant) -> _Prepared | None:
        try:
            return self._laid_out(*variant)
        except (RuntimeError, TypeError, ValueError):  # a layout or a type that no tensor can be made of
            return None

    def _laid_out(self, func: Any, args: tuple, kwargs: dict, cold: bool) -> _Prepared:
        found = list(operands((args, kwargs)))
        fixed: dict[torch.dtype, int] = {}
        places: list[tuple[int, int]] = []
        for operand in found:
            start = fixed.get(operand.dtype, 0)
            copies = 1 if operand.held else 2
            places.append((start, start + _room(operand)))
            fixed[operand.dtype] = start + (0 if operand.held else copies * _room(operand))
        ring = self._ring(found) if cold else 1
        step = {dtype: sum(_room(o) for o in found if o.held and o.dtype == dtype) for dtype in fixed}
        pools = {dtype: self._pool(dtype, fixed[dtype] + ring * step[dtype]) for dtype in fixed}
        warm = [
            (_view(pools[o.dtype], o, here), _view(pools[o.dtype], o, there))
            for o, (here, there) in zip(found, places, strict=True)
            if not o.held
        ]
        arguments = []
        for turn in range(ring):
            at = {dtype: fixed[dtype] + turn * step[dtype] for dtype in fixed}
            inputs = iter(warm)

            def tensor(operand: Operand, at: dict[torch.dtype, int] = at, inputs: Any = inputs) -> torch.Tensor:
                if not operand.held:
                    return next(inputs)[0]
                start = at[operand.dtype]
                at[operand.dtype] = start + _room(operand)
                return _view(pools[operand.dtype], operand, start)

            arguments.append(replace_operands((args, kwargs), tensor))
        return _Prepared(func, arguments, [(a, b) for a, b in warm if 0 not in a.stride()])

    def _ring(self, found: list[Operand]) -> int:
        """How many copies of the weights take turns, so that none is in the cache when its turn comes."""
        size = sum(_room(o) * o.dtype.itemsize for o in found if o.held)
        return max(1, min(64, -(-2 * cache_bytes(self.device) // size))) if size else 1

    def _pool(self, dtype: torch.dtype, length: int) -> torch.Tensor:
        pool = self._pools.get(dtype)
        if pool is None or len(pool) < length:
            self._pools.pop(dtype, None)
            length = max(length, 1)
            if dtype.is_floating_point or dtype.is_complex:
                pool = torch.empty(length, dtype=dtype, device=self.device)
                pool[: 1 << 16].copy_(torch.rand(min(length, 1 << 16), device=self.device).mul_(0.9).add_(0.1))
                for start in range(1 << 16, length, 1 << 16):
                    part = pool[start : start + (1 << 16)]
                    part.copy_(pool[: len(part)])
            else:
                pool = torch.zeros(length, dtype=dtype, device=self.device)  # as indices, zeros are in range
            self._pools[dtype] = pool
        return pool

    def _try(self, one: _Prepared) -> bool:
        try:
            self._once(one, 0)
        except Exception:  # sizes in its arguments that nobody knew how to change
            return False
        return True

    def _once(self, one: _Prepared, turn: int) -> float:
        args, kwargs = one.arguments[turn % len(one.arguments)]
        for tensor, source in one.warm:
            tensor.copy_(source)
        func = one.func
        return self._stopped(lambda: func(*args, **kwargs), calls=_CALLS)

    def _stopped(self, call: Callable[[], Any], calls: int = 1) -> float:
        if self.device.type == "cuda":
            return self._on_events(call, calls)
        if self.device.type != "cpu":
            synchronise = getattr(torch, self.device.type).synchronize
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            return time.perf_counter() - start
        now = time.thread_time if self.threads == 1 else time.perf_counter
        start = now()
        call()
        return now() - start

    def _on_events(self, call: Callable[[], Any], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls


def typical(times: Sequence[float]) -> float:
    """Return the median of the faster half: what disturbs a time makes it longer, never shorter."""
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory, 32 MiB where it is not known."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 32 << 20))
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 32 << 20


def _room(operand: Operand) -> int:
    """Elements that an operand takes in the pool."""
    if 0 in operand.shape:
        return _ALIGNED
    extent = 1 + sum((size - 1) * step for size, step in zip(operand.shape, operand.stride, strict=True))
    return -(-extent // _ALIGNED) * _ALIGNED


def _view(pool: torch.Tensor, operand: Operand, start: int) -> torch.Tensor:
    return pool.as_strided(operand.shape, operand.stride, start)
