"""Names as of 0.1, for those who import them from here; they live in `refreekv.engines.transformers`."""

from refreekv.engines.transformers.decoder import Decoder
from refreekv.engines.transformers.graph import Step

__all__ = ["Decoder", "Step"]
