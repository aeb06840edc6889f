"""Run a zoo, one process a model; results go to a file of JSON lines, from which the table is made."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nni_plugins.speedup  # noqa: F401  (before the fork: each child would import it again)
from benchmarks.zoo.work import work

ROOT = Path(__file__).resolve().parents[2]
MODES = ("exact", "all")
Build = Callable[[str], tuple[Any, Any]]


def main(zoo: str, names: Callable[[], list[str]], build: Build, argv: Sequence[str] | None = None) -> None:
    """Run the command line of one zoo.

    Parameters
    ----------
    zoo
        Its name.
    names
        Returns the names of all its models.
    build
        Returns a model and an input by name.
    """
    options = _options(zoo, argv)
    chosen = _choose(names(), options.names)
    if options.list:
        print("\n".join(chosen))
        return
    if not options.table:
        import torch._dynamo  # noqa: F401  (the first step of an optimizer imports it: once, before the fork)

        _run_all(zoo, chosen, options, build)
    rows = [row for row in latest(options.results).values() if row["zoo"] == zoo and row["model"] in set(chosen)]
    text = table(zoo, rows, chosen)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


def _options(zoo: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Prune, compact, compare and train every model of {zoo}.")
    parser.add_argument("names", nargs="*", help="models, or parts of their names followed by *; all if none is given")
    parser.add_argument("--modes", default="exact,all", help="'exact', 'all' (inexact groups too), or both")
    parser.add_argument("--results", type=Path, default=Path(f"outputs/zoo/{zoo}.jsonl"), help="file of JSON lines")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model, both modes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run models that have results, too")
    parser.add_argument("--failed", action="store_true", help="run again what was not done")
    parser.add_argument("--table", action="store_true", help="only print the table of the results so far")
    parser.add_argument("--list", action="store_true", help="only print the names")
    return parser.parse_args(argv)


def _choose(every: list[str], asked: list[str]) -> list[str]:
    if not asked:
        return every
    import fnmatch

    chosen = [name for name in every if any(fnmatch.fnmatch(name, pattern) for pattern in asked)]
    lost = [pattern for pattern in asked if not any(fnmatch.fnmatch(name, pattern) for name in every)]
    if lost:
        sys.exit(f"no model is called {lost[0]!r}; --list prints the names")
    return chosen


def _child(told: Path, zoo: str, name: str, modes: list[str], threads: int, build: Build) -> None:
    """In the child: do the work, and write down each stage."""
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(threads)
    with told.open("a") as file:

        def tell(data: dict[str, Any]) -> None:
            file.write(json.dumps(data) + "\n")
            file.flush()

        for mode in modes:
            work(lambda: build(name), mode, tell, zoo=zoo, model=name)


def _run_all(zoo: str, chosen: list[str], options: argparse.Namespace, build: Build) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = latest(options.results)
    for number, name in enumerate(chosen, 1):
        modes = [m for m in options.modes.split(",") if _wanted(known.get((zoo, name, m)), options)]
        if not modes:
            continue
        for row in _run_one(zoo, name, modes, options, build):
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"[{number}/{len(chosen)}] {name} {row['mode']}: {summary(row)}", flush=True)


def _wanted(row: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    return row is None or options.again or (options.failed and row["status"] != "done")


def _run_one(zoo: str, name: str, modes: list[str], options: argparse.Namespace, build: Build) -> list[dict[str, Any]]:
    """Do the work on one model in a process of its own, forked so that nothing need be imported again."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.jsonl"
        told.touch()
        process = context.Process(target=_child, args=(told, zoo, name, modes, options.threads, build))
        process.start()
        process.join(options.timeout)
        late = process.is_alive()
        if late:
            process.kill()
        process.join()
        rows = {row["mode"]: row for row in map(json.loads, told.read_text().splitlines())}
    for mode in modes:
        row = rows.setdefault(mode, {"zoo": zoo, "model": name, "mode": mode, "status": "running", "stage": "start"})
        if row["status"] == "running":
            row["status"] = "timeout" if late else "died"
            row["error"] = f"after {options.timeout:.0f} s" if late else f"exit {process.exitcode}"
    common = {"commit": _commit(), "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime(start)), **versions()}
    return [{**rows[mode], **common} for mode in modes]


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Return the machine, and the versions of what the results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"}
    out["python"] = platform.python_version()
    for package in ("torch", "torchvision", "timm", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def latest(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the last result of every model in every mode."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["zoo"], row["model"], row["mode"]] = row
    return rows


def summary(row: dict[str, Any]) -> str:
    """Return a result in one line."""
    if row["status"] == "done":
        parts = [f"done, {left(row, 'params')} of the parameters and {left(row, 'macs')} of the MACs left"]
        if row["mode"] == "exact":
            parts.append(f"error {row['error_of_output']:.1e}")
        if row["put_back"]:
            parts.append(f"{len(row['put_back'])} put back")
        return ", ".join(parts) + f"; {sum(row['cpu_seconds'].values()):.1f} s, {row['rss_mb']} MB"
    where = f" at {row['stage']}" if row.get("stage") else ""
    error = f" (error {row['error_of_output']:.1e})" if row["status"] == "wrong" else ""
    return f"{row['status']}{where}{error} {row.get('error', '')}"


def left(row: dict[str, Any], what: str) -> str:
    """Return the share of the parameters or MACs that is left."""
    before = row[f"{what}_before"]
    return f"{row[f'{what}_after'] / before:.0%}" if before else "-"


def table(zoo: str, rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the results as Markdown: totals, one line a model, and what is not done."""
    by = {(row["model"], row["mode"]): row for row in rows}
    lines = [f"### {zoo}", ""]
    for mode, title in (("exact", "every exact group"), ("all", "inexact groups too")):
        have = [by[name, mode] for name in names if (name, mode) in by]
        done = sum(row["status"] == "done" for row in have)
        back = sum(bool(row.get("put_back")) for row in have if row["status"] == "done")
        lines.append(f"- {title}: **{done} of {len(names)}** done" + (f", {back} with groups put back" if back else ""))
    lines += [
        "",
        "| model | parameters | prunable exactly | parameters left | MACs left | error | put back | inexact too: "
        "parameters left | watch, CPU s | speedup, CPU s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        exact, every = by.get((name, "exact"), {}), by.get((name, "all"), {})
        lines.append("| " + " | ".join([name, *_cells(exact), _outcome(every), *_times(exact)]) + " |")
    rest = [row for row in rows if row["status"] != "done"]
    if rest:
        lines += ["", "Not done:", ""]
        lines += [f"- {row['model']} ({row['mode']}): {summary(row)}{_reason(row)}" for row in rest]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    share = f"{row['share_exact']:.0%}" if "share_exact" in row else "-"
    size = f"{row['params']:,}" if "params" in row else "-"
    if row.get("status") != "done":
        return [size, share, row.get("status", "-"), "-", "-", "-"]
    error = f"{row['error_of_output']:.0e}"
    return [size, share, left(row, "params"), left(row, "macs"), error, str(len(row["put_back"]) or "")]


def _outcome(row: dict[str, Any]) -> str:
    return left(row, "params") if row.get("status") == "done" else str(row.get("status", "-"))


def _times(row: dict[str, Any]) -> list[str]:
    seconds = row.get("cpu_seconds", {})
    cells = [f"{seconds[stage]:.1f}" if stage in seconds else "-" for stage in ("watch", "speedup")]
    return [*cells, str(row.get("rss_mb", "-"))]


def _reason(row: dict[str, Any]) -> str:
    if row["status"] != "nothing" or not row.get("left_out"):
        return ""
    return ": " + "; ".join(item["reason"] for item in row["left_out"][:3])
