"""Threshold-free KV cache compression for language models (ReFreeKV, arXiv 2502.16886)."""

from refreekv import policies
from refreekv.core.quantisation import KVDtype
from refreekv.engines.transformers import CompressionSession, ReFreeKVCache, compress
from refreekv.report import CompressionReport, LayerReport, RowReport

__version__ = "0.1.0"

__all__ = [
    "CompressionReport",
    "CompressionSession",
    "KVDtype",
    "LayerReport",
    "ReFreeKVCache",
    "RowReport",
    "__version__",
    "compress",
    "policies",
]
