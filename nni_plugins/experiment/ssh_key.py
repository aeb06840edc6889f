"""A private key as NNI will read it: by the ``ssh2`` of NNI's node, which knows fewer formats than OpenSSH."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
const { utils } = require('ssh2');
const { path, passphrase } = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const text = require('fs').readFileSync(path);
let found = utils.parseKey(text, passphrase ?? undefined);
found = Array.isArray(found) ? found[0] : found;
const say = found instanceof Error ? found.message : found.isPrivateKey() ? '' : 'public';
console.log(JSON.stringify({ say,
    eight: /BEGIN (ENCRYPTED )?PRIVATE KEY/.test(text), key: /BEGIN [A-Z ]*PRIVATE KEY/.test(text) }));
"""


def key_problem(path: str, passphrase: str | None) -> str:
    """Why NNI cannot use a private key, and what to do; empty where it can.

    Parameters
    ----------
    path
        Of the key.
    passphrase
        Its passphrase, if it has one.
    """
    import nni_node

    try:
        Path(path).read_bytes()
    except FileNotFoundError:
        return f"the key file {path} is not there"
    except OSError as error:
        return f"the key file {path} cannot be read ({error.strerror})"
    folder = Path(nni_node.__path__[0])
    node = folder / ("node.exe" if sys.platform == "win32" else "node")
    given = json.dumps({"path": str(Path(path).resolve()), "passphrase": passphrase})
    try:
        answer = subprocess.run(
            [str(node), "-e", SCRIPT], input=given, cwd=folder, capture_output=True, text=True, timeout=60
        )
        found = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""  # the connection will say what is wrong
    said = str(found["say"]).lower()
    if not said:
        return ""
    if said == "public":
        return f"{path} is a public key; sshKeyFile is the private one, without .pub"
    if "no passphrase given" in said:
        return f"the key {path} has a passphrase; set sshPassphrase, or use a key without one"
    if found["eight"]:
        return f"NNI cannot read keys of the format of {path}; `ssh-keygen -p -f {path}` writes it in OpenSSH's own"
    if passphrase is not None and "passphrase" in said:
        return f"sshPassphrase does not open the key {path}"
    if not found["key"]:
        return f"{path} is no private key; `ssh-keygen -t ed25519` makes one"
    return f"the key {path} is damaged ({found['say']})"
