"""Names as of 0.1, for those who import them from here; they live in `refreekv.engines.transformers.graph`."""

from refreekv.engines.transformers.graph import Decoder, Step

__all__ = ["Decoder", "Step"]
