"""Importing NNI's speedup neither warns nor replaces what torch knows of fx's containers."""

import subprocess
import sys

CODE = """
import warnings
warnings.simplefilter("error")
import torch.fx
import torch.utils._pytree as pytree
from torch.fx.immutable_collections import immutable_dict, immutable_list
before = {cls: pytree.SUPPORTED_NODES.get(cls) for cls in (immutable_dict, immutable_list)}
warnings.simplefilter("default")
{armed}
import nni.compression.speedup.utils as utils
after = {cls: pytree.SUPPORTED_NODES.get(cls) for cls in before}
print(before == after, getattr(utils, "_register_pytree_node", None) is pytree._register_pytree_node)
"""


def run(armed):
    code = CODE.replace("{armed}", "import nni_plugins" if armed else "")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_with_us_torchs_registration_stays_and_nothing_warns():
    out = run(armed=True)
    assert out.stdout.split() == ["True", "True"]
    assert "already registered" not in out.stderr
    assert "_register_pytree_node" not in out.stderr


def test_without_us_it_is_replaced_where_torch_has_one():
    replaced = run(armed=False).stdout.split()[0] == "False"
    import nni.compression.speedup.utils  # noqa: F401

    from nni_plugins.compat.defects.pytree_registration import PATCH

    assert PATCH.state == ("applied" if replaced else "not needed")
