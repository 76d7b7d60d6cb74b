"""The method on transformers: what a user opens, and the caches that hold what a policy keeps."""

from refreekv.engines.transformers.api import CompressionSession, ReFreeKVCache, check_model, compress
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.layer import ReFreeKVLayer

__all__ = ["CompressionSession", "PrunedCache", "ReFreeKVCache", "ReFreeKVLayer", "check_model", "compress"]
