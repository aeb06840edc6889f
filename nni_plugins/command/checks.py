"""What ``nni-plugins doctor`` looks at beside :mod:`nni_plugins.compat.doctor`: our tuners in NNI, and open servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nni_plugins.compat.doctor import Finding, run_checks

EVERYWHERE = ("0.0.0.0", "::", "")


def all_checks(experiments_folder: Any, port: int) -> list[Finding]:
    """Return every finding; none of the checks raises."""
    findings = run_checks(experiments_folder, port)
    checks: tuple[Callable[[], list[Finding]], ...] = (check_tuners, check_running)
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = check.__name__.removeprefix("check_")
            text = f"the check itself failed ({type(error).__name__}: {' '.join(str(error).split())})"
            findings.append(Finding(name, True, text, "report it", warning=True))
    return findings


def check_tuners() -> list[Finding]:
    """Say whether ``tuner: {name: AMC}`` works, in ``nnictl`` too; by ``className`` our tuners always do."""
    from nni_plugins.search.registration import registered

    known = registered()
    missing = [name for name, there in known.items() if not there]
    if not missing:
        return [Finding("tuners", True, f"{', '.join(known)} are registered with NNI, for nnictl too")]
    return [
        Finding(
            "tuners",
            True,
            f"{', '.join(missing)}: not registered with NNI, so that they work by className only",
            "nni-plugins doctor --register",
            warning=True,
        )
    ]


def check_running() -> list[Finding]:
    """Look at the experiments that run: one that a bare ``nnictl`` started can be reached, and told to do anything."""
    import psutil

    from nni_plugins.experiment.manifest import known_experiments

    findings: list[Finding] = []
    for known in known_experiments():
        if known.port is None:
            continue
        try:
            connections = psutil.net_connections("tcp")
        except psutil.Error:  # not ours to see, on some systems
            return findings
        addresses = {
            one.laddr.ip for one in connections if one.laddr and one.laddr.port == known.port and one.status == "LISTEN"
        }
        name = f"experiment {known.id}"
        if addresses & set(EVERYWHERE):
            text = f"its server on port {known.port} is open to whoever reaches this machine, without a password"
            remedy = f"nnictl stop {known.id}, then nni-plugins run --resume {known.id}, which listens on 127.0.0.1"
            findings.append(Finding(name, True, text, remedy, warning=True))
        elif addresses:
            findings.append(Finding(name, True, f"runs on port {known.port} of {', '.join(sorted(addresses))} only"))
    return findings
