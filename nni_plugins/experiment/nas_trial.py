"""The process that NNI starts for one trial of an architecture search: ``python -m nni_plugins.experiment.nas_trial``.

NNI's own (``nni.nas.execution.training_service``) leaves no reason where it fails, and outlives its manager.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from nni_plugins.trial import as_trial

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one trial; 0 when it reported its final result, 1 when it could not, with the reason in its folder."""

    def work(output: Path, sample: dict[str, Any]) -> None:
        import nni

        model: Any = nni.get_next_parameter()
        sample.update(model.sample)
        logger.info("sample: %s", sample)
        model.execute()

    return as_trial(work)


if __name__ == "__main__":
    sys.exit(main())
