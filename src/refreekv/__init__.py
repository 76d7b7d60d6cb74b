"""Threshold-free KV cache compression for language models (ReFreeKV, arXiv 2502.16886)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refreekv import policies
    from refreekv.core.quantisation import KVDtype
    from refreekv.engines.calibration import Calibration
    from refreekv.engines.transformers.api import CompressionSession, ReFreeKVCache, compress
    from refreekv.evaluation.checking.calibrate import calibrate
    from refreekv.evaluation.checking.check import check
    from refreekv.report import CompressionReport, LayerReport, RowReport
    from refreekv.storage.host_store import HostStore

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CompressionReport",
    "CompressionSession",
    "HostStore",
    "KVDtype",
    "LayerReport",
    "ReFreeKVCache",
    "RowReport",
    "__version__",
    "calibrate",
    "check",
    "compress",
    "policies",
]

# Imported on first use: torch and transformers take seconds, which `refreekv --help` need not wait for.
_HOMES = {
    "Calibration": "refreekv.engines.calibration",
    "CompressionReport": "refreekv.report",
    "CompressionSession": "refreekv.engines.transformers",
    "HostStore": "refreekv.storage.host_store",
    "KVDtype": "refreekv.core.quantisation",
    "LayerReport": "refreekv.report",
    "ReFreeKVCache": "refreekv.engines.transformers",
    "RowReport": "refreekv.report",
    "calibrate": "refreekv.evaluation.checking.calibrate",
    "check": "refreekv.evaluation.checking.check",
    "compress": "refreekv.engines.transformers",
}


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("refreekv.policies")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
