"""Remote machines on loopback: real SSH daemons, each with a home folder of its own, and throw-away keys."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.ports import free_ports

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


@dataclass
class Daemon:
    """One SSH daemon, which is one machine to NNI.

    Attributes
    ----------
    home
        What it gives as home folder.
    port
        Where it listens, on 127.0.0.1.
    """

    folder: Path
    port: int
    key: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert SSHD is not None
        log = str(self.folder / "sshd.log")
        self.process = subprocess.Popen([SSHD, "-D", "-f", str(self.folder / "sshd_config"), "-E", log])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(Path(log).read_text(encoding="utf-8"))

    def kill(self) -> None:
        """Kill the daemon and every session of it, as a machine that is switched off would."""
        if self.process is None:
            return
        try:
            sessions = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            sessions = []
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for session in sessions:
            with suppress(psutil.NoSuchProcess):
                if "sshd" in session.name():
                    session.kill()
        self.process = None

    def freeze(self) -> None:
        """Let it answer no more, with every connection open: as a machine whose cable is pulled."""
        assert self.process is not None
        daemon = psutil.Process(self.process.pid)
        for one in [daemon, *daemon.children(recursive=True)]:
            if "sshd" in one.name():
                one.suspend()

    def answer_anew(self) -> None:
        """After :meth:`freeze`, take new connections; what is open stays silent."""
        assert self.process is not None
        psutil.Process(self.process.pid).resume()

    def clean(self) -> None:
        """Kill it, and what NNI left running in its home."""
        self.kill()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(str(self.home) in word for word in words):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def entry(self) -> dict[str, Any]:
        """It as an entry of ``machineList``."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip(),
            "sshKeyFile": str(self.key),
            "pythonPath": str(Path(sys.executable).parent),
        }


def make_daemon(folder: Path, known_hosts: Path, environment: dict[str, str] | None = None) -> Daemon:
    """Write the keys and the configuration of a daemon; its host key goes into `known_hosts`."""
    folder.mkdir(parents=True)
    home = folder / "home"
    home.mkdir()
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "user_key.pub").rename(folder / "authorized_keys")
    port = free_ports()
    variables = {"HOME": str(home), "OMP_NUM_THREADS": "1", **(environment or {})}
    pairs = " ".join(f'{name}="{value}"' for name, value in variables.items())
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        "ListenAddress ::1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin yes",
        f"PidFile {folder / 'sshd.pid'}",
        f"SetEnv {pairs}",
        f"Subsystem sftp internal-sftp -d {home}",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # sshd wants it where root starts it
    kind, key, *_ = (folder / "host_key.pub").read_text(encoding="utf-8").split()
    known_hosts.parent.mkdir(parents=True, exist_ok=True)
    with known_hosts.open("a", encoding="utf-8") as file:
        file.writelines(f"[{address}]:{port} {kind} {key}\n" for address in ("127.0.0.1", "::1"))
    return Daemon(folder, port, folder / "user_key")
