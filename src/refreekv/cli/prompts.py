"""Prompts: where the text comes from, and what the model is given for it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreekv.cli.app import UserError, one_line

if TYPE_CHECKING:
    from refreekv.cli.loading import Loaded


def read(prompt: str | None, file: str | None) -> str:
    """The prompt from ``--prompt`` or ``--prompt-file``, of which exactly one is given."""
    if (prompt is None) == (file is None):
        raise UserError("give the prompt by exactly one of --prompt and --prompt-file")
    text = whole(prompt, "the prompt") if prompt is not None else read_file(str(file))
    if not text.strip():
        raise UserError("the prompt is empty" + (f": {file}" if file else ""))
    return text


def read_file(file: str) -> str:
    """Text of a UTF-8 file; ``-`` is stdin."""
    try:
        if file == "-":
            return whole(sys.stdin.read(), "stdin")
        return Path(file).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read the prompt from {file}: {error.strerror or one_line(error)}") from error


def whole(text: str, name: str) -> str:
    """The text of arguments or of stdin; UserError where bytes in it are no UTF-8.

    In a locale without an encoding of its own Python stands characters in for these that no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {one_line(error)}") from error
    return text


def encode(loaded: "Loaded", text: str, *, chat: bool | None, max_new_tokens: int) -> dict[str, Any]:
    """Token ids and mask of one prompt, on the model's device.

    Parameters
    ----------
    loaded : Loaded
        The model and its tokenizer.
    text : str
        The prompt.
    chat : bool or None
        Whether it is a user's message, put into the tokenizer's chat template. None: if there is one.
    max_new_tokens : int
        Tokens for which the model's context must hold after the prompt.

    Raises
    ------
    UserError
        No chat template, no tokens, or too many.
    """
    from refreekv.cli.loading import quiet_transformers

    tokenizer = loaded.tokenizer
    if chat is None:
        chat = bool(tokenizer.chat_template)
    elif chat and not tokenizer.chat_template:
        raise UserError(f"{loaded.name} has no chat template; leave --chat out")
    with quiet_transformers():  # it would warn of long prompts; what matters is checked below
        encoded: Any = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            if chat
            else tokenizer(text, return_tensors="pt")
        )
    tokens = encoded["input_ids"].shape[1]
    if tokens == 0:
        raise UserError("the prompt is empty: the tokenizer makes no token of it")
    if loaded.context is not None and tokens + max_new_tokens > loaded.context:
        raise UserError(
            f"the prompt has {tokens:,} tokens and {max_new_tokens:,} new ones are to follow, "
            f"but the context of {loaded.name} is {loaded.context:,} tokens"
        )
    return {name: encoded[name].to(loaded.device) for name in ("input_ids", "attention_mask")}
