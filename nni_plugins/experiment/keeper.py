"""On a remote machine: NNI's trial keeper, on loopback, with this interpreter first on the trials' ``PATH``.

    python -m nni_plugins.experiment.keeper FOLDER

The manager runs it there in place of ``nni.tools.nni_manager_scripts.launch_trial_keeper`` (see ``js/ssh.js``).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nni_plugins.experiment.node import node_environment


def main() -> None:
    """Start the keeper in the background and print NNI's answer, a JSON object."""
    from nni.tools.nni_manager_scripts import launch_trial_keeper

    os.environ.update(node_environment(os.environ))
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    launch_trial_keeper.main()


if __name__ == "__main__":
    main()
