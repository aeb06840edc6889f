"""On a remote machine: NNI's trial keeper, on loopback, with this interpreter first on the trials' ``PATH``.

    python -m nni_plugins.experiment.keeper FOLDER

The manager runs it there in place of ``nni.tools.nni_manager_scripts.launch_trial_keeper`` (see ``js/ssh.js``).
What a manager that is no more left here for the same worker is ended first: resumed trials write into the same folders,
and a machine whose manager lost its power hears nothing of that.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nni_plugins.experiment.left import end, of_worker
from nni_plugins.experiment.node import node_environment


def main() -> None:
    """Start the keeper in the background and print NNI's answer, a JSON object."""
    from nni.tools.nni_manager_scripts import launch_trial_keeper

    environment = Path(sys.argv[1]).parent
    _, stubborn = end(lambda: of_worker(environment))
    if stubborn:
        sys.exit(f"process {stubborn[0]}, which an earlier manager left in {environment}, does not end; stop it")
    os.environ.update(node_environment(os.environ))
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    launch_trial_keeper.main()


if __name__ == "__main__":
    main()
