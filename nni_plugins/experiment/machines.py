"""The remote machines of an experiment, looked at before its first trial: reachable, trusted, and able to run one.

NNI would find out during the search, and would try to upgrade nni from the internet on each of them.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.errors import ExperimentError

if TYPE_CHECKING:
    import paramiko

CONNECT_SECONDS = 15.0
PROBE_SECONDS = 60.0
LEAST_DISK = 1 << 30
"""Bytes that must be free in the home folder of a machine."""


@dataclass(frozen=True)
class Machine:
    """One entry of ``trainingService.machineList``.

    Attributes
    ----------
    host, port, user
        Where, and as whom.
    key_file, passphrase, password
        One way to prove it; never shown.
    python_path
        The folder of its interpreter (``pythonPath``), or ``None`` for the ``python`` of a plain SSH command.
    """

    host: str
    port: int
    user: str
    key_file: str | None = None
    passphrase: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    python_path: str | None = None

    @property
    def name(self) -> str:
        """``host:port``, as the manager's events name it."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host and self.port != 22 else self.host
        return f"{self.user}@{host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True)
class Found:
    """What a machine answered.

    Attributes
    ----------
    machine
        Which one.
    key
        Type and base64 of its host key.
    facts
        ``python`` (path), ``version``, ``nni``, ``nni_plugins``, ``torch`` (versions), ``code`` (digest of our
        package), ``gpus``, ``free`` (bytes), ``cores``, ``host``.
    warnings
        What is odd, and does not stop it.
    """

    machine: Machine
    key: tuple[str, str]
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()


def machines_of(config: Any) -> list[Machine]:
    """The machines of NNI's canonical configuration; none where trials run on this one."""
    service = config.training_service
    return [] if getattr(service, "platform", None) != "remote" else [_machine(one) for one in service.machine_list]


def machines_of_profile(profile: dict[str, Any]) -> list[Machine]:
    """The same from the profile that NNI stored of an experiment."""
    service = (profile.get("params") or {}).get("trainingService") or {}
    if not isinstance(service, dict) or service.get("platform") != "remote":
        return []
    return [
        Machine(
            host=str(one["host"]),
            port=int(one.get("port") or 22),
            user=str(one["user"]),
            key_file=one.get("sshKeyFile"),
            passphrase=one.get("sshPassphrase"),
            password=one.get("password"),
            python_path=one.get("pythonPath"),
        )
        for one in service.get("machineList") or []
    ]


def _machine(one: Any) -> Machine:
    key = None if one.ssh_key_file is None else str(Path(one.ssh_key_file).expanduser())
    return Machine(one.host, one.port, one.user, key, one.ssh_passphrase, one.password, one.python_path)


@contextmanager
def connected(machine: Machine) -> Iterator[paramiko.SSHClient]:
    """An SSH connection to a machine whose host key is known.

    Raises
    ------
    ExperimentError
        With the machine, what is wrong, and what to do.
    """
    import paramiko

    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        client.connect(
            machine.host,
            machine.port,
            machine.user,
            password=machine.password,
            key_filename=machine.key_file,
            passphrase=machine.passphrase,
            timeout=CONNECT_SECONDS,
            banner_timeout=CONNECT_SECONDS,
            auth_timeout=CONNECT_SECONDS,
            look_for_keys=False,
            allow_agent=False,
        )
        yield client
    except ExperimentError:
        raise
    except Exception as error:
        raise ExperimentError(f"{machine}: {_why(machine, error)}") from None
    finally:
        client.close()


def _why(machine: Machine, error: Exception) -> str:
    import paramiko

    port = f" -p {machine.port}" if machine.port != 22 else ""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, paramiko.BadHostKeyException):
        return "its host key is not the one in ~/.ssh/known_hosts; somebody else may answer in its place"
    if "not found in known_hosts" in words:
        return (
            f"its host key is not known; log in once by `ssh{port} {machine.user}@{machine.host}` to check and keep it"
        )
    if isinstance(error, paramiko.PasswordRequiredException):
        return f"the key {machine.key_file} has a passphrase; set sshPassphrase, or use a key without one"
    if isinstance(error, paramiko.AuthenticationException) and machine.key_file is None:
        return "it refuses the user or the password; check both, and PasswordAuthentication in its sshd_config"
    if isinstance(error, paramiko.AuthenticationException):
        return "it refuses the user or the key; check user, sshKeyFile and its authorized_keys"
    if isinstance(error, FileNotFoundError):
        return f"the key file {machine.key_file} is not there"
    if isinstance(error, socket.gaierror):
        return "no machine has this name"
    if isinstance(error, (OSError, EOFError)):
        return f"cannot be reached ({words})"
    return f"no SSH session ({words})"


def check_machines(machines: Sequence[Machine], gpus: float | None = None) -> list[Found]:
    """Look at all machines at once.

    Parameters
    ----------
    machines
        Which.
    gpus
        ``trialGpuNumber``: GPUs that a trial asks for.

    Raises
    ------
    ExperimentError
        When one of them cannot run a trial, or is listed twice: one line with every such machine and its reason.
    """
    _check_once(machines)
    with ThreadPoolExecutor(max_workers=min(16, len(machines))) as pool:
        answers = list(pool.map(lambda machine: _attempt(machine, gpus), machines))
    wrong = [str(answer) for answer in answers if isinstance(answer, ExperimentError)]
    if wrong:
        raise ExperimentError("; ".join(wrong))
    return [answer for answer in answers if isinstance(answer, Found)]


def _check_once(machines: Sequence[Machine]) -> None:
    """Refuse one machine under two entries: its trials would share GPUs and folders without knowing of each other."""
    seen: dict[tuple[str, int, str], Machine] = {}
    for machine in machines:
        try:
            address = str(socket.getaddrinfo(machine.host, machine.port, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError):
            address = machine.host.lower()
        first = seen.setdefault((address, machine.port, machine.user), machine)
        if first is not machine:
            name = str(machine) if machine.host == first.host else f"{first} and {machine} are one machine, which"
            raise ExperimentError(
                f"machineList: {name} is listed twice; list it once, and set trialConcurrency, or maxTrialNumberPerGpu"
            )


def host_keys(found: Sequence[Found]) -> dict[str, dict[str, str]]:
    """For each ``host:port`` its host key, base64 by type: whom the manager may talk to."""
    return {one.machine.name: dict([one.key]) for one in found}


def _attempt(machine: Machine, gpus: float | None) -> Found | ExperimentError:
    try:
        return look(machine, gpus)
    except ExperimentError as error:
        return error


def look(machine: Machine, gpus: float | None = None) -> Found:
    """Look at one machine; see :func:`check_machines`."""
    from nni_plugins.experiment.ssh_key import key_problem

    if machine.key_file is not None and (problem := key_problem(machine.key_file, machine.passphrase)):
        raise ExperimentError(f"{machine}: {problem}")
    with connected(machine) as client:
        facts = _facts(machine, client)
        transport = client.get_transport()
        assert transport is not None
        key = transport.get_remote_server_key()
        try:
            transport.cancel_port_forward("127.0.0.1", transport.request_port_forward("127.0.0.1", 0))
        except Exception:
            raise ExperimentError(f"{machine}: forwards no port; set AllowTcpForwarding in its sshd_config") from None
    return Found(machine, (key.get_name(), key.get_base64()), facts, tuple(_judge(machine, facts, gpus)))


def _facts(machine: Machine, client: paramiko.SSHClient) -> dict[str, Any]:
    folder = machine.python_path
    if folder and shlex.quote(folder) != folder:
        raise ExperimentError(
            f"{machine}: pythonPath is {folder}; NNI takes it as it stands: give the whole path, "
            "without ~, spaces and quotes"
        )
    names = [f"{folder}/python", f"{folder}/python3"] if folder else ["python", "python3"]
    for name in names:
        status, output, errors = _run(client, f"{shlex.quote(name)} -", PROBE)
        if status == 0:
            try:
                return json.loads(output.strip().splitlines()[-1])
            except (ValueError, IndexError):
                raise ExperimentError(f"{machine}: its {name} answers {output.strip()[-80:]!r}") from None
        if status != 127 and "Command not found" not in errors:  # as csh says it, which ends with 1
            raise ExperimentError(
                f"{machine}: its {name} does not work: {_last_words(errors) or f'exit status {status}'}"
            )
    where = f"no Python in {folder}" if folder else "no python on the PATH of a plain SSH command; set pythonPath"
    raise ExperimentError(f"{machine}: {where}")


def _last_words(errors: str) -> str:
    """What a program said last; of a shell that points at its own command line, what it said first."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    pointed = bool(lines) and not lines[-1].strip("^~ ")
    return lines[0 if pointed else -1] if lines else ""


def _run(client: paramiko.SSHClient, command: str, text: str = "") -> tuple[int, str, str]:
    stdin, stdout, stderr = client.exec_command(command, timeout=PROBE_SECONDS)
    stdin.write(text)
    stdin.channel.shutdown_write()
    output, errors = stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")
    return stdout.channel.recv_exit_status(), output, errors


def _judge(machine: Machine, facts: dict[str, Any], gpus: float | None) -> Iterator[str]:
    """Yield what is odd there; raise where no trial can run."""
    here = own_facts()
    python = facts["python"]
    for package in ("nni", "nni_plugins"):
        wanted = here[package]
        if facts[package] is None:
            name = package.replace("_", "-")
            raise ExperimentError(
                f"{machine}: {package} is not there; `{python} -m pip install {name}=={wanted}` puts it"
            )
        if facts[package] != wanted:
            raise ExperimentError(f"{machine}: {package} is {facts[package]} there and {wanted} here; install the same")
    if facts["torch"] is None:
        raise ExperimentError(f"{machine}: torch is not there; install it for {python}")
    if facts["free"] < LEAST_DISK:
        raise ExperimentError(f"{machine}: only {facts['free'] >> 20} MiB are free in its home folder")
    if gpus and facts["gpus"] < gpus:
        raise ExperimentError(f"{machine}: has {facts['gpus']} GPUs; trialGpuNumber asks for {gpus:g}")
    if facts["code"] != here["code"]:
        yield f"{machine}: its nni_plugins {facts['nni_plugins']} is not the code that runs here"
    if facts["torch"] != here["torch"]:
        yield f"{machine}: torch is {facts['torch']} there and {here['torch']} here"


@cache
def own_facts() -> dict[str, Any]:
    """What the probe answers on this machine."""
    answer = subprocess.run([sys.executable, "-"], input=PROBE, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.strip().splitlines()[-1])


def code_digest(package: Path) -> str:
    """A digest of the package's code: equal on two machines when their code is."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".js", ".yml") and path.is_file():
            total.update(path.relative_to(package).as_posix().encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


PROBE = """
import importlib.metadata as metadata, importlib.util, json, os, platform, shutil, sys
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
code = None
spec = importlib.util.find_spec("nni_plugins")
if spec is not None and spec.origin:
    try:
        from nni_plugins.experiment.machines import code_digest
        from pathlib import Path
        code = code_digest(Path(spec.origin).parent)
    except Exception:
        pass
try:
    import pynvml
    pynvml.nvmlInit()
    gpus = pynvml.nvmlDeviceGetCount()
except Exception:
    gpus = 0
home = os.path.expanduser("~")
print(json.dumps({
    "python": sys.executable, "version": platform.python_version(), "nni": version("nni"),
    "nni_plugins": version("nni-plugins"), "torch": version("torch"), "code": code, "gpus": gpus,
    "free": shutil.disk_usage(home).free, "cores": os.cpu_count(), "host": platform.node(),
}))
"""
"""What is run there, by its Python, from standard input."""
