"""``nni-plugins bench``: how long dense and compact models take, in torch and onnxruntime, side by side in one run."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_plugins.training.errors import CompressionError, RecipeError, first_line, where
from nni_plugins.training.loaders import apply

if TYPE_CHECKING:
    pass

RUNTIMES = ("eager", "compile", "onnx", "int8", "openvino")
COMPACT, ONNX, INT8, RECIPE = "compact.safetensors", "compact.onnx", "int8.onnx", "recipe.yml"
ROUNDS = 10
"""Turns in which all contenders are timed one after the other, so that a busy moment hits all of them."""


@dataclass(frozen=True)
class Timing:
    """One contender at one batch size.

    Attributes
    ----------
    model, runtime, batch
        Which.
    median_ms, p95_ms
        Of one batch.
    ratio
        Median, in shares of the dense model's in the same runtime (of ``onnx`` for ``int8``) at this batch.
    bytes
        Size of the file, where it is one.
    peak_mib
        Peak memory of a fresh process that loads and runs it, beyond its imports; None where it was not measured.
    note
        Why there are no figures.
    """

    model: str
    runtime: str
    batch: int
    median_ms: float | None = None
    p95_ms: float | None = None
    ratio: float | None = None
    bytes: int | None = None
    peak_mib: float | None = None
    note: str = ""


@dataclass
class Contender:
    """Something that can be timed."""

    model: str
    runtime: str
    run: Callable[[Any], Any] | None
    bytes: int | None = None
    note: str = ""
    source: nn.Module | Path | None = None


def bench(
    models: dict[str, nn.Module],
    example: Any,
    *,
    files: dict[tuple[str, str], Path] | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    seconds: float = 1.0,
    memory: bool = False,
    say: Callable[[str], Any] | None = None,
    step: Callable[[int, int], Any] | None = None,
) -> list[Timing]:
    """Time models in several runtimes, in turns.

    Parameters
    ----------
    models
        By name; ``dense`` is what the others are compared with.
    example
        An input; its first dimension is the batch.
    files
        ONNX files by model and runtime (``onnx``, ``int8``). A missing float file is exported for the run.
    runtimes
        Some of ``eager``, ``compile``, ``onnx``, ``int8``.
    batches
        Sizes.
    threads
        CPU threads of every runtime.
    seconds
        For each contender at each size, at least; the first tenth is warm-up and does not count.
    memory
        Measure peak memory too, each in a process of its own.
    say
        Called with one line at a time.
    step
        Called between two timings with how many turns are done, and how many there are.

    Returns
    -------
    list of Timing
        A contender that cannot run has a note in place of figures.
    """
    from nni_plugins.export.agreement import with_batch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timings = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            contenders = _contenders(models, example, dict(files or {}), runtimes, threads, Path(scratch), say)
            for number, batch in enumerate(batches):
                inputs = with_batch(example, batch)

                def turned(turn: int, before: int = number * (ROUNDS + 1)) -> None:
                    if step is not None:
                        step(before + turn, len(batches) * (ROUNDS + 1))

                times = _in_turns(contenders, inputs, seconds, say, batch, turned)
                timings += _timings(contenders, times, batch, _peaks(contenders, inputs, threads) if memory else {})
    finally:
        torch.set_num_threads(before)
    return timings


def _contenders(
    models: dict[str, nn.Module],
    example: Any,
    files: dict[tuple[str, str], Path],
    runtimes: Sequence[str],
    threads: int,
    scratch: Path,
    say: Callable[[str], Any] | None,
) -> list[Contender]:
    found = []
    for name, model in models.items():
        model.eval()
        for runtime in runtimes:
            if runtime == "int8" and (name, runtime) not in files:
                continue
            if say is not None:
                say(f"{name}: {runtime}")
            try:
                found.append(_contender(name, runtime, model, example, files, threads, scratch))
            except Exception as error:  # a compiler that is missing, an operator that an exporter lacks
                found.append(Contender(name, runtime, None, note=first_line(error)))
    return found


def _contender(
    name: str,
    runtime: str,
    model: nn.Module,
    example: Any,
    files: dict[tuple[str, str], Path],
    threads: int,
    scratch: Path,
) -> Contender:
    if runtime == "eager":
        return Contender(name, runtime, lambda inputs: apply(model, inputs), source=model)
    if runtime == "compile":
        compiled: Any = torch.compile(model)
        with torch.no_grad():
            apply(compiled, example)
        return Contender(name, runtime, lambda inputs: apply(compiled, inputs))
    from nni_plugins.export.onnx import export_onnx, feed_of, session_of

    path = files.get((name, "onnx" if runtime == "openvino" else runtime))
    if path is None:
        path = Path(export_onnx(model, example, scratch / f"{name}.onnx").path)
    if runtime == "openvino":
        from nni_plugins.export.openvino import compiled_of, run_openvino

        compiled_file = compiled_of(path, threads)
        return Contender(name, runtime, lambda inputs: run_openvino(compiled_file, inputs), path.stat().st_size)
    session = session_of(path, threads)
    return Contender(
        name, runtime, lambda inputs: session.run(None, feed_of(session, inputs)), path.stat().st_size, source=path
    )  # fmt: skip


@torch.no_grad()
def _in_turns(
    contenders: list[Contender],
    inputs: Any,
    seconds: float,
    say: Callable[[str], Any] | None,
    batch: int,
    turned: Callable[[int], Any],
) -> list[list[float]]:
    """Milliseconds of each run of each contender."""
    times: list[list[float]] = [[] for _ in contenders]
    if say is not None:
        say(f"timing at batch {batch}")
    for turn in range(ROUNDS + 1):  # the first is warm-up
        turned(turn)
        for contender, own in zip(contenders, times, strict=True):
            if contender.run is None:
                continue
            end = time.perf_counter() + seconds / ROUNDS
            try:
                for count in range(10_000):
                    took = _milliseconds(contender.run, inputs)
                    now = time.perf_counter()
                    if turn:
                        own.append(took)
                    if now > end and count >= 1:
                        break
            except Exception as error:  # a fixed batch size, for one
                contender.note, contender.run = f"batch {batch}: {where(error)}", None
    return times


def _milliseconds(run: Callable[[Any], Any], inputs: Any) -> float:
    """Time one run: by the clock on a CPU, by events on the GPU where its inputs are."""
    if any(leaf.is_cuda for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(inputs)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run(inputs)
    return 1000 * (time.perf_counter() - start)


def _peaks(contenders: list[Contender], inputs: Any, threads: int) -> dict[tuple[str, str], float | None]:
    """Peak memory by model and runtime; a compiled model is not measured."""
    from nni_plugins.report.bench_memory import peak_mib

    return {
        (one.model, one.runtime): peak_mib(
            "onnx" if isinstance(one.source, Path) else "eager", one.source, inputs, threads
        )
        for one in contenders
        if one.source is not None
    }


def _timings(
    contenders: list[Contender], times: list[list[float]], batch: int, peaks: dict[tuple[str, str], float | None]
) -> list[Timing]:
    medians = {
        (contender.model, contender.runtime): statistics.median(own)
        for contender, own in zip(contenders, times, strict=True)
        if own
    }
    found = []
    for contender, own in zip(contenders, times, strict=True):
        base = medians.get(("dense", "onnx" if contender.runtime == "int8" else contender.runtime))
        if not own:
            found.append(Timing(contender.model, contender.runtime, batch, bytes=contender.bytes, note=contender.note))
            continue
        middle, ordered = medians[contender.model, contender.runtime], sorted(own)
        found.append(
            Timing(
                contender.model,
                contender.runtime,
                batch,
                median_ms=middle,
                p95_ms=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
                ratio=middle / base if base else None,
                bytes=contender.bytes,
                peak_mib=peaks.get((contender.model, contender.runtime)),
            )
        )
    return found


def run(
    target: str,
    inputs: tuple[str, ...],
    inputs_function: str | None,
    batches: str,
    runtimes: str,
    threads: int,
    seconds: float,
    memory: bool,
    as_json: bool,
    progress: bool | None = None,
) -> None:
    """Run the command: the options of ``nni-plugins bench``, as they were given.

    Raises
    ------
    RecipeError, CompressionError
        With one line.
    """
    from nni_plugins.command import show
    from nni_plugins.command.progress import bar_of

    sizes = _numbers(batches)
    chosen = tuple(item.strip() for item in runtimes.split(",") if item.strip())
    if not chosen:
        raise RecipeError(f"--runtimes {runtimes}: write some of {', '.join(RUNTIMES)}")
    for item in chosen:
        if item not in RUNTIMES:
            raise RecipeError(f"--runtimes: {item} is none of {', '.join(RUNTIMES)}")
    console = show.progress(progress)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    # No thread of its own redraws the bar: it would take time from what is timed.
    with contextlib.redirect_stdout(sys.stderr), bar_of(console, auto_refresh=False) as bar:
        task = bar.add_task("timing", total=None, text="")
        models, example, files = find_models(target, inputs, inputs_function)
        timings = bench(
            models,
            example,
            files=files,
            runtimes=chosen,
            batches=sizes,
            threads=threads,
            seconds=seconds,
            memory=memory,
            say=say,
            step=lambda done, total: bar.update(task, completed=done, total=total, refresh=True),
        )
    if as_json:
        print(json.dumps([asdict(timing) for timing in timings], indent=1))
        return
    show.results().print(table(timings, target, threads))


def table(timings: Sequence[Timing], title: str, threads: int) -> Any:
    """The timings for a terminal."""
    from rich.table import Table

    from nni_plugins.report.table import size

    made = Table(title=f"{title}: {threads} CPU thread{'s' if threads > 1 else ''}", title_justify="left")
    memory = any(one.peak_mib is not None for one in timings)
    for name in ("model", "runtime", "batch", "median", "95%", "of dense", "file", *(["memory"] if memory else [])):
        made.add_column(name, justify="left" if name in ("model", "runtime") else "right")
    for one in timings:
        if one.median_ms is None:
            made.add_row(one.model, one.runtime, str(one.batch), "–", "–", one.note[:60], "")
            continue
        ratio = "" if one.ratio is None else f"{100 * one.ratio:.0f}%"
        file = "" if one.bytes is None else size(one.bytes)
        times = f"{one.median_ms:.3f} ms", f"{one.p95_ms:.3f} ms"
        peak = "" if one.peak_mib is None else f"{one.peak_mib:.1f} MiB"
        made.add_row(one.model, one.runtime, str(one.batch), *times, ratio, file, *([peak] if memory else []))
    return made


def finished_folder(target: str) -> Path:
    """Return the folder of the compact model, which a report keeps in ``best``."""
    folder = Path(target)
    return folder / "best" if (folder / "best" / COMPACT).is_file() else folder


def find_models(
    target: str, inputs: tuple[str, ...], inputs_function: str | None
) -> tuple[dict[str, nn.Module], Any, dict[tuple[str, str], Path]]:
    """Return the models of a folder that a compression left, or one by ``module:function``, an input, and files."""
    from nni_plugins.report.inspect_target import RECIPES, find_target

    folder = finished_folder(target)
    if not folder.is_dir():
        if ":" not in target and not target.lower().endswith(RECIPES):
            raise CompressionError(
                f"{target}: no such folder; give one that nni-plugins run or compress left, module:function or a recipe"
            )
        found = find_target(target, inputs, inputs_function)
        with torch.no_grad():
            try:
                apply(found.model, found.dummy_input)
            except Exception as error:  # whatever a forward raises
                raise RecipeError(f"{target}: the model fails on {found.input_text()}: {where(error)}") from error
        return {"dense": found.model}, found.dummy_input, {}
    if not (folder / RECIPE).is_file() or not (folder / COMPACT).is_file():
        raise CompressionError(f"{target}: no compression is here; {RECIPE} and {COMPACT} are what it leaves")
    from nni_plugins.training.artefacts import load_model
    from nni_plugins.training.data import build_data
    from nni_plugins.training.models import build_model
    from nni_plugins.training.recipe import load_recipe

    recipe = load_recipe(folder / RECIPE)
    data = build_data(recipe)
    dense = build_model(recipe, data.shape, data.classes, recipe.seed)
    models = {"dense": dense, "compact": load_model(recipe, data, folder / COMPACT)}
    names = (("onnx", ONNX), ("int8", INT8))
    files = {("compact", kind): folder / name for kind, name in names if (folder / name).is_file()}
    return models, data.example, files


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise RecipeError(f"--batches {text}: write sizes such as 1,32")
    return found
