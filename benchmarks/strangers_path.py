"""How long a stranger needs: from a clone to a first report, and from a model of one's own to a compact ONNX file.

    python benchmarks/strangers_path.py                   # one's own model: the file and the commands of the docs' page
    python benchmarks/strangers_path.py --clone           # a fresh clone and `make demo` too

The commands are those of docs/first-experiment.md and docs/guides/own-model.md, run one after the other in an empty
folder, each a process of its own, and timed from its start to its end. What pip downloads depends on the line, so the
installation is timed apart, and its cache may be warm: say so beside the number. Writes
benchmarks/results/strangers_path.json, and the tables of docs/strangers-path.md; ``--table`` writes these only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "strangers_path.json"
PAGE = ROOT / "docs" / "guides" / "own-model.md"
SHOWN = ROOT / "docs" / "strangers-path.md"
MARKS = "<!-- tables: benchmarks/strangers_path.py -->\n", "<!-- end of tables -->\n"
PATHS = {"clone": "from a clone to a first report", "own": "from a model of one's own to a compact ONNX file"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_commands() -> list[str]:
    """The commands of the page's section on the command line, as they stand there."""
    section = PAGE.read_text(encoding="utf-8").partition("## From the command line")[2]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].strip().split("\n")  # type: ignore[index]


def run(command: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one command as a shell would; its seconds, and the last line that it printed."""
    print(f"$ {command}", flush=True)
    words = shlex.split(command, comments=True)
    start = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    print(f"  {seconds:.1f} s", flush=True)
    return {"command": command, "seconds": round(seconds, 1)}


def own_model(folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The page's net.py and commands."""
    text = re.search(r'```python title="net.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    (folder / "net.py").write_text(text[1], encoding="utf-8")
    steps = [run(command, folder, environment) for command in own_commands()]
    onnx = folder / "outputs" / "mine" / "best" / "compact.onnx"
    steps[-1]["onnx_bytes"] = onnx.stat().st_size
    return steps


def clone(folder: Path, environment: dict[str, str], pip_flags: str, python: str) -> list[dict[str, Any]]:
    """A fresh clone; installation and search are timed apart, though `make demo` alone does both."""
    flags = f" PIP_FLAGS={shlex.quote(pip_flags)}" if pip_flags else ""
    home = folder / "nni-plugins"
    steps = [run(f"git clone --quiet {ROOT} nni-plugins", folder, environment)]
    steps.append(run(f"make install PYTHON={python}{flags}", home, environment))
    steps.append(run(f"make demo PORT={environment['NNI_PLUGINS_PORT']}{flags}", home, environment))
    assert (home / "outputs" / "demo" / "report.html").is_file()
    for step, shown in zip(steps, ("git clone ...", "make install", "make demo"), strict=True):
        step["command"] = shown
    return steps


def table(found: dict[str, Any]) -> str:
    """Rows for the page: commands, their times, and the sum."""
    lines = []
    for name, title in PATHS.items():
        if name not in found:
            continue
        steps = found[name]["steps"]
        counted = [step for step in steps if step["command"] != "make install"]  # `make demo` does it by itself
        total = sum(step["seconds"] for step in steps)
        lines += [f"## {title[0].upper()}{title[1:]}: {len(counted)} commands, {total / 60:.1f} minutes", ""]
        lines += ["| command | seconds |", "|---|---|"]
        lines += [f"| `{step['command']}` | {step['seconds']:.0f} |" for step in steps] + [""]
        machine = ", ".join(f"{key} {value}" for key, value in found[name]["machine"].items())
        lines += [f"{found[name]['date']}. {machine}. {found[name]['note']}", ""]
    return "\n".join(lines)


def show(found: dict[str, Any]) -> None:
    """Put the tables into the page."""
    text = SHOWN.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    SHOWN.write_text(before + MARKS[0] + table(found) + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")
    print(table(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clone", action="store_true", help="a fresh clone and make demo too")
    parser.add_argument("--pip-flags", default="", help="for make: an index of CPU builds, for example")
    parser.add_argument("--note", default="", help="what else is to be known: other work on the machine, a warm cache")
    parser.add_argument("--table", action="store_true", help="write the tables of the page; run nothing")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if options.table:
        show(found)
        return 0
    sys.path.insert(0, str(ROOT))
    from nni_plugins.report.environment import environment as machine

    with tempfile.TemporaryDirectory(prefix="strangers-path-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NNI_")}
        environment |= {
            "HOME": str(folder / "home"),
            "NNI_PLUGINS_PORT": str(free_port()),
            "NNI_PLUGINS_EXPERIMENTS_FOLDER": str(folder / "experiments"),
            "NNI_CONFIG_DIR": str(folder / "nni"),
        }
        for path in [*(["clone"] if options.clone else []), "own"]:
            if path == "clone":
                steps = clone(folder, environment, options.pip_flags, sys.executable)
            else:
                environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
                steps = own_model(folder, environment)
            found[path] = {"steps": steps, "machine": machine(), "date": str(date.today()), "note": options.note}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
