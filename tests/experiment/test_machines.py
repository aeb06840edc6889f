"""Remote machines, looked at and copied from: real SSH daemons on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nni_plugins.experiment import fetch, machines
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.fetch import Fetcher
from nni_plugins.experiment.machines import Machine, check_machines, host_keys, look, own_facts
from nni_plugins.experiment.ssh_key import key_problem
from tests.end_to_end.machines import SSHD, Daemon, make_daemon

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="SSH daemons of POSIX"),
    pytest.mark.skipif(SSHD is None and not os.environ.get("CI"), reason="no sshd here; CI has one"),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A machine that this user knows."""
    root = tmp_path_factory.mktemp("ssh")
    found = make_daemon(root / "machine", root / "home" / ".ssh" / "known_hosts")
    found.start()
    yield found
    found.clean()


@pytest.fixture(autouse=True)
def home(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = daemon.folder.parent / "home"
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def machine(daemon: Daemon) -> Machine:
    entry = daemon.entry()
    return Machine("127.0.0.1", daemon.port, entry["user"], str(daemon.key), python_path=entry["pythonPath"])


def test_a_machine_that_can_run_a_trial(machine: Machine, daemon: Daemon) -> None:
    (found,) = check_machines([machine])
    here = own_facts()
    for name in ("nni", "nni_plugins", "torch", "code", "cores"):
        assert found.facts[name] == here[name]
    assert found.warnings == ()
    kind, key, *_ = (daemon.folder / "host_key.pub").read_text(encoding="utf-8").split()
    assert host_keys([found]) == {machine.name: {kind: key}}


def test_what_cannot_run_a_trial_is_one_line_for_all_machines(machine: Machine, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "python").write_text("#!/bin/sh\necho 'no libpython3.so' >&2\nexit 1\n", encoding="utf-8")
    (broken / "python").chmod(0o755)
    (tmp_path / "key").write_bytes(Path(machine.key_file or "").read_bytes()[:100])
    wrong = {
        "cannot be reached": replace(machine, port=1),
        "no machine has this name": replace(machine, host="no-such-host.invalid"),
        "it refuses the user or the key": replace(machine, user="nobody-here"),
        "is not there": replace(machine, key_file=str(tmp_path / "absent")),
        "no Python in /nowhere": replace(machine, python_path="/nowhere"),
        "does not work: no libpython3.so": replace(machine, python_path=str(broken)),
        "give the whole path, without ~": replace(machine, python_path="~/x'y/bin"),
        f"the key {tmp_path / 'key'} is damaged": replace(machine, key_file=str(tmp_path / "key")),
    }
    for words, one in wrong.items():
        with pytest.raises(ExperimentError) as caught:
            look(one)
        assert words in str(caught.value)
        assert str(caught.value).startswith(str(one))
        assert "\n" not in str(caught.value)
    with pytest.raises(ExperimentError) as caught:
        check_machines([machine, *(wrong[words] for words in list(wrong)[:3])])  # the others are this one again
    assert all(words in str(caught.value) for words in list(wrong)[:3])
    with pytest.raises(ExperimentError, match="has 0 GPUs; trialGpuNumber asks for 64"):
        look(machine, 64)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "pem"])
def test_the_passphrase_of_a_key_is_tried_before_anybody_is_talked_to(
    machine: Machine, daemon: Daemon, kind: str, tmp_path: Path
) -> None:
    key, allowed = tmp_path / "key", daemon.folder / "authorized_keys"
    shape = ["-t", "rsa", "-m", "PEM"] if kind == "pem" else ["-t", kind]
    subprocess.run(["ssh-keygen", "-q", *shape, "-N", "a secret", "-f", str(key)], check=True)
    before = allowed.read_text(encoding="utf-8")
    allowed.write_text(before + key.with_suffix(".pub").read_text(encoding="utf-8"), encoding="utf-8")
    locked = replace(machine, key_file=str(key))
    try:
        assert look(replace(locked, passphrase="a secret")).facts["torch"]
        with pytest.raises(ExperimentError, match=f"the key {key} has a passphrase; set sshPassphrase"):
            look(locked)
        with pytest.raises(ExperimentError, match=r"sshPassphrase does not open the key|is damaged") as caught:
            look(replace(locked, passphrase="another one"))
        assert "another one" not in str(caught.value)
    finally:
        allowed.write_text(before, encoding="utf-8")


def test_a_key_that_nni_cannot_read_says_how_to_mend_it(machine: Machine, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-m", "PKCS8", "-N", "", "-f", str(key)], check=True)
    with pytest.raises(ExperimentError, match=f"`ssh-keygen -p -f {key}` writes it in OpenSSH's own"):
        look(replace(machine, key_file=str(key)))
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "", "-f", str(key)], check=True)
    assert key_problem(str(key), None) == ""
    assert "public key; sshKeyFile is the private one" in key_problem(f"{key}.pub", None)
    assert "is no private key" in key_problem(__file__, None)
    assert "cannot be read (Is a directory)" in key_problem(str(tmp_path), None)


def test_a_machine_that_is_listed_twice_is_refused(machine: Machine) -> None:
    with pytest.raises(ExperimentError, match=r"machineList: \S+@127.0.0.1\S* is listed twice; list it once"):
        check_machines([machine, replace(machine, python_path=None)])
    with pytest.raises(
        ExperimentError, match=r"@127.0.0.1\S* and \S+@localhost\S* are one machine, which is listed twice"
    ):
        check_machines([replace(machine, port=1), machine, replace(machine, host="localhost")])


def test_a_machine_by_its_ipv6_address(machine: Machine) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    sixth = replace(machine, host="::1")
    (found,) = check_machines([sixth])
    assert list(host_keys([found])) == [f"::1:{machine.port}"]
    assert str(sixth).endswith(f"@[::1]:{machine.port}")


def test_a_machine_whose_key_is_unknown_or_another_is_not_talked_to(machine: Machine, home: Path) -> None:
    known = home / ".ssh" / "known_hosts"
    text = known.read_text(encoding="utf-8")
    try:
        known.write_text("", encoding="utf-8")
        with pytest.raises(ExperimentError, match=r"its host key is not known; log in once by `ssh -p \d+ "):
            look(machine)
        name, kind, _ = text.splitlines()[0].split()
        other = "AAAAC3NzaC1lZDI1NTE5AAAAIFAuo2kFvSK3rqhn6RdPYY1mLmb6QXOHm8vqWXRhAkXn"
        known.write_text(f"{name} {kind} {other}\n", encoding="utf-8")
        with pytest.raises(ExperimentError, match="somebody else may answer in its place"):
            look(machine)
    finally:
        known.write_text(text, encoding="utf-8")


def test_without_our_package_or_forwarding_it_says_what_to_do(machine: Machine, tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    bare = replace(machine, python_path=str(folder / "bin"))
    with pytest.raises(ExperimentError, match=r"nni is not there; `.*python\S* -m pip install nni==3\.0` puts it"):
        look(bare)
    closed = make_daemon(tmp_path / "closed", home / ".ssh" / "known_hosts")
    config = closed.folder / "sshd_config"
    config.write_text(config.read_text(encoding="utf-8") + "AllowTcpForwarding no\n", encoding="utf-8")
    closed.start()
    try:
        with pytest.raises(ExperimentError, match="forwards no port; set AllowTcpForwarding"):
            look(replace(machine, port=closed.port, key_file=str(closed.key)))
    finally:
        closed.clean()


def test_secrets_are_in_no_text(machine: Machine) -> None:
    secret = replace(machine, password="correct horse", passphrase="battery staple")
    assert "horse" not in repr(secret) + str(secret)
    with pytest.raises(ExperimentError) as caught:
        look(replace(secret, port=1))
    assert "horse" not in str(caught.value)
    assert "staple" not in str(caught.value)


def test_only_plain_files_of_a_trials_own_folder_are_copied(machine: Machine, daemon: Daemon, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine", encoding="utf-8")
    trial = daemon.home / "nni-experiments" / "exp1" / "environments" / "worker1" / "trials" / "abc"
    (trial / "folder").mkdir(parents=True)
    (trial / "metrics.json").write_text("{}", encoding="utf-8")
    (trial / ".hidden").write_text("no", encoding="utf-8")
    (trial / "a\\..\\b").write_text("no", encoding="utf-8")
    (trial / "link").symlink_to(secret)
    outside = trial.parent / "elsewhere"
    outside.symlink_to(tmp_path)
    here = tmp_path / "experiments" / "exp1"
    with Fetcher([machine], here) as fetcher:
        assert fetcher.trial("abc") == here / "environments" / "worker1" / "trials" / "abc"
        assert fetcher.trial("elsewhere") is None  # a link is no trial
        assert fetcher.trial("absent") is None
    assert [path.relative_to(here).as_posix() for path in sorted(here.rglob("*")) if path.is_file()] == [
        "environments/worker1/trials/abc/metrics.json"
    ]


def test_a_machine_that_is_silent_is_not_asked_for_every_trial(
    machine: Machine, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Machine] = []

    def connected(one: Machine) -> AbstractContextManager[Any]:
        asked.append(one)
        monkeypatch.setattr(machines, "CONNECT_SECONDS", 0.3 if one == gone else 60.0)
        return machines.connected(one)

    monkeypatch.setattr(fetch, "connected", connected)
    trial = daemon.home / "nni-experiments" / "exp2" / "environments" / "worker2" / "trials" / "abc"
    trial.mkdir(parents=True)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        gone = replace(machine, port=silent.getsockname()[1])
        with Fetcher([gone, machine], tmp_path / "exp2") as fetcher:
            for _ in range(5):
                assert fetcher.trial("abc") is not None  # the other one has it
                with pytest.raises(ExperimentError, match="was not brought here"):
                    fetcher.trial("absent")
    assert asked == [gone, machine]


def test_a_copy_that_was_cut_off_leaves_no_trial(
    machine: Machine, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramiko

    trial = daemon.home / "nni-experiments" / "exp3" / "environments" / "worker1" / "trials" / "abc"
    trial.mkdir(parents=True)
    for name in ("compact.safetensors", "metrics.json"):
        (trial / name).write_text("whole", encoding="utf-8")
    whole, copied = paramiko.SFTPClient.get, []

    def get(session: paramiko.SFTPClient, source: str, target: str) -> None:
        if copied:
            raise EOFError("the connection is lost")
        copied.append(source)
        whole(session, source, target)

    target = tmp_path / "exp3" / "environments" / "worker1" / "trials" / "abc"
    monkeypatch.setattr(paramiko.SFTPClient, "get", get)
    with Fetcher([machine], tmp_path / "exp3") as fetcher, pytest.raises(ExperimentError, match="was not brought here"):
        fetcher.trial("abc")
    assert copied
    assert not target.exists()
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(daemon.folder.parent / "home"))
    with Fetcher([machine], tmp_path / "exp3") as fetcher:
        assert fetcher.trial("abc") == target
    assert sorted(path.name for path in target.iterdir()) == ["compact.safetensors", "metrics.json"]
    assert [path.name for path in target.parent.iterdir()] == ["abc"]
