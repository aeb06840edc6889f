"""Run a piece of Python in a process of its own, with NNI as it is or with our patches."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

IMPORT = "import nni_plugins\n"


def run_python(code: str, *, patched: bool) -> Any:
    """Return what `code` prints last, read as JSON."""
    source = "import warnings; warnings.simplefilter('ignore')\n" + IMPORT * patched + textwrap.dedent(code)
    # NNI walks over sets of names: the same order each time.
    env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
