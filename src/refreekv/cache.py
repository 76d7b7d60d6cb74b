"""Names as of 0.1, for those who import them from here; they live in `refreekv.engines.transformers`."""

from refreekv.engines.transformers import PrunedCache, ReFreeKVLayer

__all__ = ["PrunedCache", "ReFreeKVLayer"]
