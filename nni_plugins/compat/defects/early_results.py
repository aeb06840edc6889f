"""After a resume, a trial that ends before the tuner is ready is lost to the tuner, or ends it.

NNI's manager starts trials that were cut off again as soon as it is resumed, while the tuner still imports. When one of
them ends before the manager has told the dispatcher of these trials, its result belongs to an unknown parameter id,
and is dropped with a warning; and the trial that the manager asks for in its place gets an id that is taken, at whose
result the dispatcher dies of a ``KeyError``. Here both wait until the trials are known.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from nni_plugins.compat.hook import Patch

MARK = "_nni_plugins_waits"
_logger = logging.getLogger(__name__)


def _defect(module: Any) -> bool:
    return not hasattr(module.MsgDispatcher._handle_final_metric_data, MARK)


def _mend(module: Any) -> None:
    dispatcher = module.MsgDispatcher
    handle, recover = dispatcher._handle_final_metric_data, dispatcher.handle_add_customized_trial
    request = dispatcher.handle_request_trial_jobs

    @functools.wraps(handle)
    def handle_final(self: Any, data: Any) -> None:
        number = data["parameter_id"]
        known = number in module._trial_params or number in module._customized_parameter_ids
        if number is None or known or self.recovered_max_param_id >= 0:
            handle(self, data)
            return
        _logger.info("the result of trial %s waits until the trials of before are known", number)
        self.__dict__.setdefault("_early_results", {})[number] = data["value"]

    @functools.wraps(recover)
    def handle_customized(self: Any, data: Any) -> None:
        recover(self, data)
        for number, value in self.__dict__.pop("_early_results", {}).items():
            if number in self.recovered_trial_params:
                self.tuner.import_data([{"parameter": self.get_previous_param(number), "value": value}])

        waiting = self.__dict__.pop("_early_requests", 0)
        if waiting:
            request(self, waiting)

    @functools.wraps(request)
    def handle_request(self: Any, data: int) -> None:
        if module.dispatcher_env_vars.NNI_MODE == "resume" and self.recovered_max_param_id < 0:
            self._early_requests = self.__dict__.get("_early_requests", 0) + data
            return
        request(self, data)

    setattr(handle_final, MARK, True)
    dispatcher.handle_request_trial_jobs = handle_request
    dispatcher._handle_final_metric_data = handle_final
    dispatcher.handle_add_customized_trial = handle_customized


PATCH = Patch(
    name="early-results",
    module="nni.runtime.msg_dispatcher",
    mends="after a resume, a trial that ends before the tuner is ready is dropped, and the tuner never hears of it",
    defect=_defect,
    mend=_mend,
)
