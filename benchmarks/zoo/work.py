"""The work on one model: watch, prune half of every group, speed up, compare with a masked copy, train one step."""

from __future__ import annotations

import copy
import gc
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo.weights import calibrate, draw, redraw, two_of
from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.call import output_tensors
from nni_plugins.channels.watch import as_arguments

#: A difference up to this share of the output's size counts as equal.
TOLERANCE = 1e-4


class Record:
    """What is known so far of one model in one mode; the stage is told as it changes, in case the process is killed."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], **start: Any) -> None:
        self.data: dict[str, Any] = {**start, "status": "running", "stage": "", "seconds": {}, "cpu_seconds": {}}
        self._tell = tell

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.data["stage"] = name
        self._tell(self.data)
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.data["seconds"][name] = round(time.perf_counter() - start, 3)
            self.data["cpu_seconds"][name] = round(time.process_time() - cpu, 3)
            self.data["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def work(
    build: Callable[[], tuple[nn.Module, Any]],
    mode: str,
    tell: Callable[[dict[str, Any]], None],
    *,
    sparsity: float = 0.5,
    **start: Any,
) -> dict[str, Any]:
    """Do the work on one model and return what happened, as plain data.

    Parameters
    ----------
    build
        Returns the model and an input for it.
    mode
        'exact': every prunable exact group, and the result must equal the masked copy; 'all': every prunable group,
        and the result must have the right shapes.
    tell
        Called with what is known whenever a new stage begins.
    sparsity
        The share of every group that goes.
    start
        What the result begins with.
    """
    record = Record(tell, **start, mode=mode)
    try:
        record.data["status"] = _work(build, mode, record, sparsity)
        record.data["stage"] = ""
    except Exception as error:
        record.data |= failure(error)
    tell(record.data)
    return record.data


def failure(error: BaseException) -> dict[str, Any]:
    """Return an exception as plain data: type, first line, and the last frames."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = str(error).strip().splitlines()
    return {
        "status": "error",
        "error": f"{type(error).__name__}: {lines[0][:300] if lines else ''}",
        "frames": [f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno} {f.name}" for f in frames[-6:]],
    }


def _work(build: Callable[[], tuple[nn.Module, Any]], mode: str, record: Record, sparsity: float) -> str:
    from nni_plugins.speedup import ModelSpeedup

    data = record.data
    with record.stage("build"):
        torch.manual_seed(0)
        model, x = build()
        draw(model)
        model.eval()
    with record.stage("watch"):
        graph = ChannelGraph.watch(model, x)
    data |= describe(graph)
    wanted = [g for g in graph.groups if g.prunable and (g.exact or mode == "all")]
    data["groups_asked"] = len(wanted)
    if not wanted:
        return "nothing"
    with record.stage("plan"):
        kept = half(graph, [g.name for g in wanted], sparsity)
        masks = Plan(graph, kept).masks(model)
    with record.stage("masked"):
        calibrate(model, x, masks)
        inputs = [redraw(x, 1), redraw(x, 2)]
        dense = _outputs(model, inputs[0])
        expected = masked_outputs(model, masks, inputs)
    if not any(tensor.numel() for tensor in expected[0]):
        return "no output"  # a detector that found no box: nothing is shown
    data["signal"] = _signal(expected, dense)
    with record.stage("speedup"):
        speedup = ModelSpeedup(model, x, masks, exact_only=mode == "exact")
        compact = speedup.speedup_model()
    del masks
    data |= _reported(speedup, graph)
    with record.stage("compare"):
        actual = [_outputs(compact, each) for each in inputs]
        data["error_of_output"] = max(difference(a, e) for a, e in zip(actual, expected, strict=True))
        shapes = [[tuple(t.shape) for t in each] for each in (actual[0], expected[0])]
        finite = all(bool(torch.isfinite(t).all()) for t in actual[0])
    with record.stage("train"):
        data["trained"] = train_step(compact, x, lambda: build()[0])
    with record.stage("run after training"):
        after = _outputs(compact, inputs[0])
    if mode == "exact" and not data["error_of_output"] <= TOLERANCE:
        return "wrong"
    if shapes[0] != shapes[1] or [tuple(t.shape) for t in after] != shapes[0]:
        return "wrong shapes"
    if not finite or not all(bool(torch.isfinite(t).all()) for t in after):
        return "not finite"
    if data["params_after"] >= data["params_before"]:
        return "nothing"
    return "done"


def half(graph: ChannelGraph, names: list[str], sparsity: float = 0.5) -> dict[str, np.ndarray]:
    """Return, for each named group, the units that stay: a random choice, at least one unit goes and one stays."""
    rng = np.random.default_rng(0)
    kept = {}
    for name in names:
        size = graph.group(name).size
        gone = min(max(1, int(size * sparsity)), size - 1)
        kept[name] = np.sort(rng.permutation(size)[gone:])
    return kept


def masked_outputs(model: nn.Module, masks: dict, inputs: list[Any]) -> list[list[torch.Tensor]]:
    """Return the outputs of a deep copy of ``model`` whose weights are multiplied by ``masks``."""
    twin = copy.deepcopy(model).eval()
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                parameter = parameters[f"{module}.{target}" if module else target]
                if id(parameter) not in done:
                    done.add(id(parameter))
                    parameter.mul_(mask)
    twin.train().eval()  # what it kept of the weights before they were masked is dropped
    outputs = [_outputs(twin, each) for each in inputs]
    del twin, parameters
    gc.collect()
    return outputs


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = as_arguments(inputs)
    torch.manual_seed(1)  # a forward may draw random numbers (a masked autoencoder), and must draw the same ones
    with torch.no_grad():
        out = model(*args, **kwargs)
    return [t.detach().clone() for t in output_tensors(out) if t.is_floating_point()]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference as a share of the output's size, the worst of all output tensors."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not e.numel():
            continue
        size = e.abs().max().item()
        error = (a.double() - e.double()).abs().max().item()
        if error != error:
            return float("inf")
        worst = max(worst, error / size if size else (0.0 if error == 0 else float("inf")))
    return worst


def _signal(expected: list[list[torch.Tensor]], dense: list[torch.Tensor]) -> dict[str, float]:
    """How far outputs on two inputs are apart, and how far masking moves them: what an error would be hidden under."""
    return {
        "inputs": round(difference(expected[0], expected[1]), 4),
        "masking": round(difference(expected[0], dense), 4),
    }


def train_step(model: nn.Module, x: Any, dense: Callable[[], nn.Module]) -> str:
    """Train one step in training mode, on a batch of two; return how.

    Where that fails, and fails with the dense model too, a batch of one and then eval mode are tried.
    """
    ways = [("train, batch 2", two_of(x)), ("train, batch 1", x), ("eval, batch 1", x)]
    for how, inputs in ways:
        try:
            _step(model.train(not how.startswith("eval")), inputs)
        except Exception:
            try:
                _step(dense().train(not how.startswith("eval")), inputs)
            except Exception:
                continue
            raise
        model.eval()
        return how
    return "not at all, nor does the dense model"


def _step(model: nn.Module, inputs: Any) -> None:
    args, kwargs = as_arguments(inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    optimizer.zero_grad()
    outputs = [t for t in output_tensors(model(*args, **kwargs)) if t.is_floating_point() and t.requires_grad]
    loss = sum((t.float().pow(2).mean() for t in outputs), torch.zeros(()))
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.shape != parameter.shape:
            raise AssertionError(f"the gradient of {name} has another shape")
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not torch.isfinite(norm) or not norm > 0:
        raise ValueError(f"the norm of the gradient is {norm.item()}")
    optimizer.step()
    optimizer.zero_grad()


def _reported(speedup: Any, graph: ChannelGraph) -> dict[str, Any]:
    report = speedup.report
    removed = set(report.removed)
    return {
        "params_before": report.params_before,
        "params_after": report.params_after,
        "macs_before": report.macs_before,
        "macs_after": report.macs_after,
        "groups_removed": len(removed),
        "put_back": report.put_back[:20],
        "stayed": report.stayed[:20],
        "inexact": report.inexact[:20],
        "speedup_seconds": {k: round(v, 3) for k, v in report.seconds.items()},
    }


def describe(graph: ChannelGraph) -> dict[str, Any]:
    """Return how much of a model can be pruned: groups, shares of parameters, and what leaves out the rest and why."""
    sets = {
        "exact": [g for g in graph.groups if g.prunable and g.exact],
        "inexact": [g for g in graph.groups if g.prunable and not g.exact],
        "frozen": [g for g in graph.groups if not g.prunable],
    }
    total = sum(int(np.prod(s)) for n, s in graph.shapes.items() if not graph.is_buffer[n])
    reached = {kind: _reach(graph, groups) for kind, groups in sets.items() if kind != "frozen"}
    out: dict[str, Any] = {"data": graph.trace.data, "operators": len(graph.trace.operators), "params": total}
    for kind, groups in sets.items():
        out[f"groups_{kind}"] = len(groups)
    for kind, shares in reached.items():
        out[f"share_{kind}"] = round(sum(shares.values()) / total, 4) if total else 0.0
    reasons: dict[str, list] = {}
    for kind in ("inexact", "frozen"):
        for group in sets[kind]:
            cause = _general(group.reason)
            entry = reasons.setdefault(f"{kind}: {cause}", [0, 0.0, group.name, group.reason])
            entry[0] += 1
            for member in group.members:
                if not graph.is_buffer[member.name]:
                    size = float(np.prod(graph.shapes[member.name]))
                    part = member.indices.size / graph.shapes[member.name][member.dim]
                    entry[1] += max(0.0, size * part - reached["exact"].get(member.name, 0.0))
    out["left_out"] = [
        {"why": why, "groups": n, "share": round(size / total, 4), "example": name, "reason": reason}
        for why, (n, size, name, reason) in sorted(reasons.items(), key=lambda item: -item[1][1])
    ][:12]
    out["unknown_operators"] = sorted({op for op, _ in graph.trace.unknown})
    out["unused"] = [f.reason for f in graph.frozen if "not used" in f.reason][:10]
    return out


def _reach(graph: ChannelGraph, groups: list) -> dict[str, float]:
    """Return, by parameter, how many of its entries lie in units of ``groups``."""
    chosen = np.zeros(len(graph.solution), dtype=bool)
    for group in groups:
        chosen[group.classes] = True
    out = {}
    for name, labels in graph.trace.parameters.items():
        if graph.is_buffer[name]:
            continue
        outside = 1.0
        for array in labels:
            if array is not None:
                outside *= 1 - float(chosen[graph.solution.classes[array]].mean())
        if outside < 1:
            out[name] = float(np.prod(graph.shapes[name])) * (1 - outside)
    return out


def _general(reason: str) -> str:
    """A reason without the module's name: 'cropped (aten.pad in stem.conv)' -> 'cropped (aten.pad)'."""
    head, found, tail = reason.rpartition(" in ")
    return f"{head})" if found and tail.endswith(")") else reason
