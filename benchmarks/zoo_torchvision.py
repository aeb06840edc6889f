"""Every model of torchvision: half of every group goes, the rest must equal the masked model, and train.

    python benchmarks/zoo_torchvision.py [names…] [--modes exact,all] [--results FILE] [--failed]

Classification (80 models), segmentation, detection, video and optical flow. Weights are random. Images are the
smallest that the model takes of a few sizes. Detectors run in double precision: of boxes with scores that are equal but
for rounding they keep one or the other. So do the models of optical flow, whose twelve rounds make rounding grow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.zoo.runner import main

#: Tried in this order.
SIZES = (64, 96, 128, 224, 299)
SECTIONS = ("classification", "segmentation", "detection", "video", "optical_flow")


def sections() -> dict[str, list[str]]:
    """Return the names of all models by section, classification first."""
    from torchvision import models

    return {
        section: models.list_models(module=models if section == "classification" else getattr(models, section))
        for section in SECTIONS
    }


def names() -> list[str]:
    """Return the names of all models, classification first."""
    return [name for inside in sections().values() for name in inside]


def build(name: str) -> tuple[Any, Any]:
    """Return a model and an input for it."""
    import torch
    from torchvision import models

    section = next(section for section, inside in sections().items() if name in inside)
    extra: dict[str, Any] = {"weights_backbone": None} if section in ("segmentation", "detection") else {}
    if section == "detection" and not name.startswith("ssd"):
        extra |= {"min_size": 256, "max_size": 256}  # else it makes its images larger
    if name.startswith(("retinanet", "fcos")):
        extra["score_thresh"] = 0.0  # else random weights find nothing
    if name.startswith(("keypointrcnn", "maskrcnn")):
        extra["box_detections_per_img"] = 10  # each is drawn by itself, in Python
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = False  # only to save half a minute of scipy
    model = models.get_model(name, weights=None, **extra).eval()
    if section in ("detection", "optical_flow"):
        model.double()
    if section == "optical_flow":
        _grids_in_double(torch)
    x = _first_that_runs(model, list(_inputs(section, torch)))
    return model.eval(), x


def _grids_in_double(torch: Any) -> None:
    """Let a forward of optical flow run in double precision, for which its grids must be; the process is its own."""
    from torchvision.models.optical_flow import raft

    torch.set_default_dtype(torch.float64)
    make = raft.make_coords_grid
    raft.make_coords_grid = lambda *args, **kwargs: make(*args, **kwargs).double()


def _inputs(section: str, torch: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    if section == "detection":
        yield ([torch.rand(3, 256, 256, generator=generator).double()],)
    elif section == "optical_flow":
        yield noise(1, 3, 128, 128).double(), noise(1, 3, 128, 128).double()
    elif section == "video":
        for frames, size in ((8, 64), (16, 112), (16, 224)):
            yield noise(1, 3, frames, size, size)
    else:
        for size in SIZES:
            yield noise(1, 3, size, size)


def _first_that_runs(model: Any, inputs: list[Any]) -> Any:
    """Return the first input that the model takes, in training mode too: auxiliary heads want larger images."""
    import torch

    for x in inputs[:-1]:
        args = x if isinstance(x, tuple) else (x,)
        try:
            with torch.no_grad():
                model.eval()(*args)
                model.train()(*(torch.cat([each, each]) for each in args))
        except Exception:
            continue
        return x
    return inputs[-1]


if __name__ == "__main__":
    import torchvision  # noqa: F401  (before the fork)

    main("torchvision", names, build)
