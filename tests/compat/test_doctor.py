"""Each check of the doctor, sound and broken."""

import importlib.metadata
import os
import shutil
import socket
import sys
from collections import namedtuple

import pytest

from nni_plugins.compat import doctor, patches
from tests.end_to_end.ports import free_ports


@pytest.fixture
def setting(tmp_path):
    return doctor.Setting(tmp_path / "experiments", free_ports())


def test_all_is_well_here(setting):
    findings = doctor.run_checks(experiment_folder=setting.folder, port=setting.port)
    assert [str(finding) for finding in findings if not finding.ok] == []
    assert {f"patch: {patch.name}" for patch in patches()} <= {finding.name for finding in findings}
    assert all("\n" not in str(finding) for finding in findings)
    assert not setting.folder.exists()


def test_every_fault_has_a_remedy(setting, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    checks = (doctor.check_python, doctor.check_setuptools, doctor.check_nni, doctor.check_node, doctor.check_torch)
    findings = [check(setting) for check in (*checks, doctor.check_packages)]
    assert not any(finding.ok for finding in findings)
    assert all(finding.remedy for finding in findings)


def test_node_runs(setting):
    assert doctor.check_node(setting).message.startswith("NNI's node v")


def test_node_that_does_not_run(setting, monkeypatch, tmp_path):
    node = tmp_path / "node"
    node.write_text("#!/bin/sh\necho 'version GLIBC_2.28 not found' >&2\nexit 1\n")
    node.chmod(0o755)
    (tmp_path / "main.js").write_text("")
    spec = namedtuple("Spec", "submodule_search_locations")([str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    finding = doctor.check_node(setting)
    assert not finding.ok
    assert "GLIBC_2.28 not found" in finding.message


def test_port_taken_and_impossible(setting):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = doctor.check_port(doctor.Setting(setting.folder, taken.getsockname()[1]))
    assert not finding.ok
    assert "taken" in finding.message
    assert not doctor.check_port(doctor.Setting(setting.folder, 70000)).ok
    assert doctor.check_port(setting).ok


def test_full_disk(setting, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 10**9, 0))
    finding = doctor.check_disk(setting)
    assert not finding.ok
    assert "0.00 GiB free" in finding.message


def test_folder_that_cannot_be_written(setting, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert not doctor.check_write(doctor.Setting(file / "inside", 8080)).ok
    assert doctor.check_write(setting).ok
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert not doctor.check_write(setting).ok
        tmp_path.chmod(0o700)


def test_failed_patch_is_told(setting, monkeypatch):
    patch = patches()[0]
    monkeypatch.setattr(patch, "state", "failed")
    monkeypatch.setattr(patch, "detail", "KeyError: 'gone'")
    (finding,) = [f for f in doctor.check_patches(setting) if f.name == f"patch: {patch.name}"]
    assert not finding.ok
    assert "KeyError: 'gone'" in finding.message


def test_a_broken_check_is_a_finding(setting, monkeypatch):
    def check_nothing(setting):
        raise ZeroDivisionError("none")

    monkeypatch.setattr(doctor, "CHECKS", (check_nothing, doctor.check_openness))
    broken, openness = doctor.run_checks(setting.folder, setting.port)
    assert (broken.name, broken.ok) == ("nothing", False)
    assert openness.ok
    assert openness.warning
    assert openness.to_dict()["remedy"].startswith("keep the port behind a firewall")
