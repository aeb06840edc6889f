"""Out of NNI and into other forms: ``torch.nn.utils.prune``."""

from nni_plugins.export.torch_prune import from_torch_prune, to_torch_prune

__all__ = ["from_torch_prune", "to_torch_prune"]
