"""Can NNI work here? One small check each, in :data:`CHECKS`; every finding is a line, and a line on how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PYTHONS = ((3, 10), (3, 12))
TORCH_VERSIONS = ((2, 4), (2, 14))
NNI_MAJOR = 3
SETUPTOOLS_BELOW = 81
DEFAULT_PORT = 8080
DISK_WANTED_GIB = 1.0
SLOW_MODULES = "nni.nas."  # imports Lightning, which takes seconds
MODULES_NEEDED = {
    "tensorboard": "nni.common.graph_utils imports it",
    "numpy": "NNI imports it",
    "scipy": "NNI's tuners import it",
}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Parameters
    ----------
    name
        What was checked: ``"python"``, ``"port"``, ``"patch: tensor-base"``.
    ok
        False where something that is needed does not work.
    message
        One line: what was found, or what is wrong.
    remedy
        One line: how to mend it; empty where there is nothing to do.
    warning
        True for what works but deserves a thought; `ok` is then True.
    """

    name: str
    ok: bool
    message: str
    remedy: str = ""
    warning: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        mark = "!" if self.warning else "ok" if self.ok else "x"
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{mark:>2}  {self.name}: {self.message}{remedy}"


@dataclass(frozen=True)
class Setting:
    """Where an experiment would run: its folder, and the port of its web page."""

    folder: Path
    port: int


Check = Callable[[Setting], "Finding | list[Finding]"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    parts = [part for part in version.replace("+", ".").split(".")[:2] if part.isdigit()]
    return (int(parts[0]), int(parts[1]) if len(parts) > 1 else 0) if parts else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def check_python(setting: Setting) -> Finding:
    """Python is one that NNI and this package run on."""
    here = sys.version_info[:2]
    found = f"Python {sys.version.split()[0]} at {sys.executable}"
    if PYTHONS[0] <= here <= PYTHONS[1]:
        return Finding("python", True, found)
    wanted = f"{_dotted(PYTHONS[0])} to {_dotted(PYTHONS[1])}"
    return Finding("python", False, f"{found}; {wanted} is needed", f"make a virtual environment with Python {wanted}")


def check_setuptools(setting: Setting) -> Finding:
    """``pkg_resources`` is there, which nnictl imports."""
    version = _version("setuptools")
    remedy = f'pip install "setuptools<{SETUPTOOLS_BELOW}"'
    if importlib.util.find_spec("pkg_resources") is None:
        return Finding("setuptools", False, f"setuptools {version} has no pkg_resources, which nnictl imports", remedy)
    return Finding("setuptools", True, f"setuptools {version}, with pkg_resources")


def check_nni(setting: Setting) -> Finding:
    """NNI 3 is installed."""
    version = _version("nni")
    if version is None:
        return Finding("nni", False, "NNI is not installed", 'pip install "nni>=3.0,<4"')
    if _numbers(version)[0] != NNI_MAJOR:
        return Finding("nni", False, f"NNI {version}; version 3 is needed", 'pip install "nni>=3.0,<4"')
    return Finding("nni", True, f"NNI {version}")


def check_node(setting: Setting) -> Finding:
    """NNI's bundled node runs: it is the manager of every experiment."""
    spec = importlib.util.find_spec("nni_node")
    if spec is None or not spec.submodule_search_locations:
        return Finding("node", False, "NNI's node folder (nni_node) is missing", "pip install --force-reinstall nni")
    folder = Path(next(iter(spec.submodule_search_locations)))
    node = folder / ("node.exe" if sys.platform == "win32" else "node")
    if not node.is_file() or not (folder / "main.js").is_file():
        return Finding("node", False, f"{node} or main.js is missing", "install NNI from its wheel, not from sources")
    try:
        run = subprocess.run([str(node), "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("node", False, f"{node} does not run: {error}", "pip install --force-reinstall nni")
    if run.returncode != 0:
        lines = (run.stderr or run.stdout).strip().splitlines()
        why = lines[0] if lines else f"exit status {run.returncode}"
        remedy = "this system lacks a library that NNI's node needs (an older glibc?); use a newer system or image"
        return Finding("node", False, f"{node} does not run: {why}", remedy)
    return Finding("node", True, f"NNI's node {run.stdout.strip()} runs")


def check_torch(setting: Setting) -> Finding:
    """Torch is one that the patches were tried on."""
    version = _version("torch")
    low, high = TORCH_VERSIONS
    if version is None:
        return Finding("torch", False, "torch is not installed", f'pip install "torch>={_dotted(low)}"')
    if _numbers(version) < low:
        remedy = f'pip install "torch>={_dotted(low)}"'
        return Finding("torch", False, f"torch {version}; {_dotted(low)} or later is needed", remedy)
    if _numbers(version) > high:
        found = f"torch {version} is later than {_dotted(high)}, the last that was tried"
        return Finding("torch", True, found, f'if something fails: pip install "torch<={_dotted(high)}"', warning=True)
    return Finding("torch", True, f"torch {version}")


def check_packages(setting: Setting) -> Finding:
    """The packages are there that NNI imports without asking for them."""
    missing = [name for name in MODULES_NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        why = "; ".join(f"{name} is missing ({MODULES_NEEDED[name]})" for name in missing)
        return Finding("packages", False, why, f"pip install {' '.join(missing)}")
    return Finding("packages", True, ", ".join(f"{name} {_version(name)}" for name in MODULES_NEEDED))


def check_port(setting: Setting) -> Finding:
    """Nobody listens on the port of NNI's web page."""
    port = setting.port
    if not 0 < port < 65536:
        return Finding("port", False, f"port {port} does not exist", "choose one from 1024 to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if not taken:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except PermissionError:
                return Finding("port", False, f"port {port} needs administrator rights", "choose one from 1024 on")
            except OSError:
                taken = True
    if taken:
        remedy = f"stop what listens there (nnictl stop --port {port}?), or choose another port with --port"
        return Finding("port", False, f"port {port} is taken", remedy)
    return Finding("port", True, f"port {port} is free")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(setting: Setting) -> Finding:
    """There is room for logs, the database and the compact models."""
    try:
        free = shutil.disk_usage(_existing(setting.folder)).free / 2**30
    except OSError as error:
        return Finding("disk", False, f"the space beside {setting.folder} cannot be read: {error}", "choose another")
    if free < DISK_WANTED_GIB:
        found = f"{free:.2f} GiB free for {setting.folder}; an experiment on a full disk ends in ERROR"
        return Finding("disk", False, found, f"free {DISK_WANTED_GIB:.0f} GiB, or choose a folder on another disk")
    return Finding("disk", True, f"{free:.1f} GiB free for {setting.folder}")


def check_write(setting: Setting) -> Finding:
    """The folder of the experiments can be written."""
    folder = setting.folder.expanduser().absolute()
    existing = _existing(folder)
    remedy = f"chmod u+rwx {existing}, or choose another folder"
    if not existing.is_dir():
        return Finding("folder", False, f"{existing} is a file", "choose another folder")
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".nni-plugins-doctor-"):
            pass
    except OSError as error:
        return Finding("folder", False, f"{existing} cannot be written ({error.strerror or error})", remedy)
    return Finding("folder", True, f"{folder} can be {'written' if folder.exists() else 'made'}")


def check_openness(setting: Setting) -> Finding:
    """Say that NNI's REST server is open to whoever reaches the machine, unless ``nni-plugins run`` starts it."""
    return Finding(
        "rest server",
        True,
        "a bare nnictl listens on every address, with no password, and can start any command; "
        "nni-plugins run listens on 127.0.0.1",
        "keep the port behind a firewall; reach it from elsewhere with "
        f"ssh -L {setting.port}:127.0.0.1:{setting.port} this-machine",
        warning=True,
    )


def check_patches(setting: Setting) -> list[Finding]:
    """Import what the patches mend, and tell the state of each. Takes as long as importing torch."""
    from nni_plugins.compat import patches

    reasons: dict[str, str] = {}
    for module in dict.fromkeys(patch.module for patch in patches()):
        if module.startswith(SLOW_MODULES):
            reasons[module] = "it will be looked at when it is imported"
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            reasons[module] = f"{type(error).__name__}: {error}"
    findings = []
    for patch in patches():
        name = f"patch: {patch.name}"
        if patch.state == "failed":
            remedy = "report it with your versions of torch and NNI; other parts of NNI work"
            findings.append(Finding(name, False, f"could not mend {patch.module} ({patch.detail})", remedy))
        elif patch.state == "waiting":
            why = patch.detail or reasons.get(patch.module, "its module was not imported")
            findings.append(Finding(name, True, f"waiting for {patch.framework or patch.module} ({why})"))
        else:
            detail = f" ({patch.detail})" if patch.detail else ""
            findings.append(Finding(name, True, f"{patch.state}{detail}"))
    return findings


CHECKS: tuple[Check, ...] = (
    check_python,
    check_setuptools,
    check_nni,
    check_node,
    check_torch,
    check_packages,
    check_port,
    check_disk,
    check_write,
    check_openness,
    check_patches,
)


def run_checks(experiment_folder: str | os.PathLike[str] | None = None, port: int | None = None) -> list[Finding]:
    """Run every check; none of them raises.

    Parameters
    ----------
    experiment_folder
        Where NNI would keep the experiments; by default ``~/nni-experiments``, as NNI has it. Need not exist.
    port
        Port of NNI's web page and REST server; 8080 by default.

    Returns
    -------
    list of Finding
        In the order of :data:`CHECKS`, one for each patch at the end. All is well where each is ``ok``.
    """
    folder = Path(experiment_folder) if experiment_folder is not None else Path("~/nni-experiments")
    setting = Setting(folder.expanduser(), DEFAULT_PORT if port is None else port)
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            found = check(setting)
        except Exception as error:
            name = check.__name__.removeprefix("check_")
            found = Finding(name, False, f"the check itself failed ({type(error).__name__}: {error})", "report it")
        findings += found if isinstance(found, list) else [found]
    return findings
