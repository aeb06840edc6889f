"""Every configuration that is shipped is accepted by NNI's own loader; those for machines need the machines' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_plugins.experiment.machines import Machine, machines_of

ROOT = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize("path", sorted(ROOT.glob("services/*.yml")), ids=lambda path: path.stem)
def test_other_services_are_accepted_by_nni(path: Path) -> None:
    from nni.experiment.config import ExperimentConfig, utils

    utils.unset_base_path()
    config = ExperimentConfig.load(path).canonical_copy()
    config.validate()
    assert config.training_service.platform == path.stem
    assert "not run by us" in path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/config.remote.yml")), ids=lambda path: path.parent.name)
def test_remote_configurations_differ_from_local_ones_in_their_machines(path: Path, tmp_path: Path) -> None:
    from nni_plugins.experiment.launch import load_config
    from nni_plugins.experiment.nas_config import is_nas, load_nas_config

    remote = yaml.safe_load(path.read_text(encoding="utf-8"))
    local = yaml.safe_load(path.with_name("config.yml").read_text(encoding="utf-8"))
    service = remote.pop("trainingService")
    assert local.pop("trainingService") == {"platform": "local"}
    assert remote == local
    key = tmp_path / "id"
    key.touch()
    for machine in service["machineList"]:
        machine["sshKeyFile"] = str(key)
    changed = path.with_name(f"test-{tmp_path.name}.yml")
    changed.write_text(yaml.safe_dump({**remote, "trainingService": service}), encoding="utf-8")
    try:
        config: Any = load_nas_config(changed)[0] if is_nas(changed) else load_config(changed)
    finally:
        changed.unlink()
    hosts = [("worker1.example.org", 22), ("worker2.example.org", 22)]
    found = machines_of(config)
    assert [(one.host, one.port) for one in found] == hosts
    assert found[0] == Machine("worker1.example.org", 22, "me", str(key), python_path="/home/me/venv/bin")
    assert config.trial_command.split()[0] in ("python", "python3")  # that of each machine, not of this one
