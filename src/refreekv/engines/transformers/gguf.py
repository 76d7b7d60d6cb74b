"""What transformers is told of a GGUF file; its releases differ in what they can be told."""

from typing import Any


def gguf_config(weights: str) -> Any:
    """What `from_pretrained` is told of a .gguf file's weights; None where the release of transformers knows no choice.

    transformers keeps weights in their blocks for a few architectures, and with kernels that it fetches through the
    package ``kernels``; in all other cases it unpacks them, whatever it is told.
    """
    config = _gguf_config_class()
    return None if config is None else config(dequantize=weights == "unpacked")


def _gguf_config_class() -> Any:
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.17
        return None
    return GgufConfig
