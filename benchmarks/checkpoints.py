"""Models of the benchmarks: a .gguf file, a folder with one or with a checkpoint, or a hub id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from refreekv.engines.transformers import packed_weights
from refreekv.engines.transformers.gguf import gguf_config


def load(
    place: str,
    device: str,
    dtype: str,
    change: Callable[[Any], None] = lambda config: None,
    *,
    packed: bool = False,
) -> tuple[Any, Any, str]:
    """A model, its tokenizer and its name; ``change`` may alter the configuration in place before.

    With ``packed`` the weights of a .gguf file stay as they are, and so does the configuration.
    """
    path = Path(place)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    source: dict[str, Any] = {}
    unpacked: dict[str, Any] = {}
    if files:
        place, source["gguf_file"] = str(files[0].parent), files[0].name
        if (config := gguf_config("unpacked")) is not None:
            unpacked["quantization_config"] = config
    tokenizer = AutoTokenizer.from_pretrained(place, **source)
    if packed:
        model = packed_weights.load(files[0], device=torch.device(device), dtype=getattr(torch, dtype))
        return model, tokenizer, f"{files[0].name}, packed"
    config = AutoConfig.from_pretrained(place, **source)
    change(config)
    model = AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=getattr(torch, dtype), **source, **unpacked
    )
    return model.to(torch.device(device)).eval(), tokenizer, files[0].name if files else path.name
