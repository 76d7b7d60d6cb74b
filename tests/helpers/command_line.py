"""What the tests of the command line share: tiny models in folders, and a way to run a command."""

from collections.abc import Callable, Sequence
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
ROLES = ["<user>", "<system>", "<assistant>", "<end>"]
DIALOGUE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content | trim }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def save_tokenizer(folder: Path, chat_template: str | None = None, roles: Sequence[str] = ()) -> int:
    """Save a tokenizer of 92 words and special ones for ``roles``; its size."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *roles, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=list(roles)
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_llama(folder: Path, chat_template: str | None = None) -> Path:
    """Save a Llama with random weights and its tokenizer."""
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(vocab_size=save_tokenizer(folder, chat_template), **SHAPE)).save_pretrained(folder)
    return folder


def save_chat_model(
    folder: Path, template: str | None = DIALOGUE, *, end: bool = False, context: int = 4_096, **changes: Any
) -> Path:
    """Save a Llama that talks in words; with ``end`` it soon ends its answers by itself."""
    size = save_tokenizer(folder, template, ROLES)
    torch.manual_seed(5)
    shape = {**SHAPE, "max_position_embeddings": context, **changes}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape))
    model.lm_head.weight.data[: 2 + len(ROLES)] *= 1e-3  # words only
    if end:
        model.lm_head.weight.data[5] = model.lm_head.weight.data[6:].sum(0) * 0.4
    model.save_pretrained(folder)
    return folder


def words(count: int, seed: int) -> str:
    """A message of so many words."""
    return " ".join(f"w{(seed * 31 + index * index) % 90}" for index in range(count))


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


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    """One line on stderr that says why, and code 2."""
    assert outcome.code == 2
    assert outcome.out == ""
    progress = ("Loading ", "Warming up", "Full cache", "Checking", "Calibrating")
    said = [line for line in outcome.err.splitlines() if not line.startswith(progress)]
    assert len(said) == 1, outcome.err
    assert said[0].startswith("refreekv: error: ")
    for fragment in fragments:
        assert fragment in said[0]
