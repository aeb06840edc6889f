"""This package's tuners under NNI's names: ``tuner: {name: AMC}`` in ``config.yml``, and ``nnictl algo list``.

``nnictl algo register --meta nni_plugins/search/meta/amc.yml`` registers one of them; :func:`register_all` does so
for all. NNI keeps what is registered in its own configuration folder (``NNI_CONFIG_DIR``, or the environment's
``nni`` folder).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nni_plugins.search.errors import SearchError

META = Path(__file__).parent / "meta"


def algorithms() -> list[dict[str, Any]]:
    """Return what there is to register: the contents of the files in ``meta/``."""
    import yaml

    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(META.glob("*.yml"))]


def registered() -> dict[str, bool]:
    """Return for each tuner's name whether NNI knows it, as the class that it is here."""
    from nni.tools.package_utils import get_algo_meta

    found = {}
    for meta in algorithms():
        known = get_algo_meta(meta["builtinName"])
        found[meta["builtinName"]] = known is not None and known.class_name == meta["className"]
    return found


def register_all() -> list[str]:
    """Register every tuner with NNI, as ``nnictl algo register`` does; returns their names.

    Raises
    ------
    SearchError
        Where NNI's configuration folder cannot be written.
    """
    import nni
    from nni.tools.package_utils import AlgoMeta, register_algo_meta

    names = []
    for meta in algorithms():
        try:
            register_algo_meta(AlgoMeta.load({**meta, "nniVersion": nni.__version__}))
        except OSError as error:
            raise SearchError(f"{meta['builtinName']} cannot be registered: {error}; set NNI_CONFIG_DIR") from None
        names.append(meta["builtinName"])
    return names


def check_tuner(name: str | None, class_name: str | None = None, class_args: dict[str, Any] | None = None) -> None:
    """Check a tuner of this package, as ``config.yml`` names it, before anything starts; others are left alone.

    NNI 3 does not run the validators of registered algorithms: a wrong argument shows as a tuner that does not connect.

    Raises
    ------
    SearchError
        In one line: it is not registered, or a class argument that does not fit.
    """
    for meta in algorithms():
        own, attribute = meta["className"].rpartition(".")[2], str(class_name or "").rpartition(".")[2]
        if str(name or "").lower() != meta["builtinName"].lower() and attribute != own:
            continue
        if class_name is None and not registered()[meta["builtinName"]]:
            raise SearchError(
                f"tuner {name} is not registered with NNI: nnictl algo register --meta {META / _file_of(meta)}"
            )
        module, _, validator = meta["classArgsValidator"].rpartition(".")
        getattr(import_module(module), validator)().validate_class_args(**(class_args or {}))


def _file_of(meta: dict[str, Any]) -> str:
    return f"{meta['builtinName'].lower()}.yml"
