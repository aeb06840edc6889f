"""The process that NNI starts for one trial of an architecture search: ``python -m nni_plugins.experiment.nas_trial``.

NNI's own (``nni.nas.execution.training_service``) leaves no reason where it fails, and outlives its manager.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from nni_plugins.experiment.folders import FAILURE, trial_output, write_failure
from nni_plugins.experiment.guard import die_with_manager, only_writer
from nni_plugins.trial import EXPECTED

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one trial; 0 when it reported its final result, 1 when it could not, with the reason in its folder."""
    die_with_manager()
    output = trial_output()
    sample: dict[str, Any] = {}
    try:
        with only_writer(output):
            (output / FAILURE).unlink(missing_ok=True)
            import nni

            model: Any = nni.get_next_parameter()
            sample = dict(model.sample)
            logger.info("sample: %s", sample)
            model.execute()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = type(error).__name__ in EXPECTED
        logger.error("this trial cannot work: %s", reason, exc_info=not expected)
        write_failure(output, reason if expected else f"{type(error).__name__}: {reason}", error, sample)
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
