"""Chat templates: messages to tokens, what follows an answer, and where answers end."""

from typing import Any

ANSWER = "\x02refreekv-answer\x03"
"""Stands for an answer while the text that follows it is looked for."""


class TemplateRefusal(ValueError):  # noqa: N818 - what a template says to messages, and no error of the program
    """Why a chat template does not take messages."""


def render(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Messages as the model reads them, up to where its answer begins.

    Raises
    ------
    TemplateRefusal
        The template does not take them.
    """
    from jinja2 import TemplateError  # chat templates need it anyway

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables))
    except (TemplateError, TypeError, ValueError) as error:
        raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error


def tokens_of(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text; ``special``: with those that a tokenizer adds by itself, which templates write themselves."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def after_answer(tokenizer: Any, before: list[dict[str, Any]], said: dict[str, Any]) -> list[int]:
    """What the template writes after an answer: its end, the message, the next answer's beginning.

    Raises
    ------
    TemplateRefusal
        The template does not show answers, or does not take these messages.
    """
    text = render(tokenizer, [*before, {"role": "assistant", "content": ANSWER}, said])
    _, found, after = text.rpartition(ANSWER)
    if not found:
        raise TemplateRefusal("it does not show answers, so no message can follow")
    return tokens_of(tokenizer, after)


def stop_tokens(model: Any, tokenizer: Any, before: list[dict[str, Any]] | None = None) -> list[int]:
    """Tokens that end an answer: the model's, and what its template writes behind one after ``before``."""
    found = model.generation_config.eos_token_id
    stop = list(found) if isinstance(found, list | tuple) else [found] if found is not None else []
    if tokenizer.eos_token_id is not None:
        stop.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        said = {"role": "user", "content": "hello"}
        after = after_answer(tokenizer, [*(before or []), said], said)
        if after and after[0] in tokenizer.all_special_ids:
            stop.append(after[0])
    return sorted(set(map(int, stop)))
