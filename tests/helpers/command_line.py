"""What the tests of the command line share: tiny models in folders, and a way to run a command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from refreekv.cli.commands import app

WORDS = [f"w{index}" for index in range(90)]
PROMPT = " ".join(WORDS[index * index % 90] for index in range(60))
CONTEXT = 128
CHAT_TEMPLATE = "{% for message in messages %}w1 w2 {{ message['content'] }} w3{% endfor %}"

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def save_tokenizer(folder: Path, chat_template: str | None = None) -> int:
    """Save a tokenizer of 92 words; its size."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_llama(folder: Path, chat_template: str | None = None) -> Path:
    """Save a Llama with random weights and its tokenizer."""
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(vocab_size=save_tokenizer(folder, chat_template), **SHAPE)).save_pretrained(folder)
    return folder


def full_cache(folder: Path, prompt: str, count: int) -> list[int]:
    """What a saved model goes on with after a prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=count, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function that runs the command line in this process."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()  # what setting up the test printed
        with pytest.raises(SystemExit) as ended:
            app(list(arguments), prog_name="refreekv")
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return call
