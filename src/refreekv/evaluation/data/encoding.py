"""Samples as tokens: what is compressed, what comes after it, and the gold answer."""

from dataclasses import dataclass
from typing import Any

from refreekv.evaluation.data.samples import Sample

ANSWER_TOKENS = 64
"""Tokens of a gold answer that are scored."""

MARK = "\x02refreekv-question\x03"
"""Stands in a text where the part ends that is compressed before the rest is known."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample."""

    context: list[int]  # what is prefilled and compressed
    question: list[int]  # the second turn; empty where the context holds everything
    answer: list[int]  # the first gold answer; empty where none is known
    text: str  # the context before it was tokenized, chat template included


def encode(tokenizer: Any, sample: Sample) -> Encoded:
    """Tokenize a sample.

    A question belongs to the same user message as the prompt it is about: the message is
    put into the chat template as a whole and cut where the prompt ends. Both parts are
    tokenized alone, as a cache that was filled before the question was known would have it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer. One without chat template gets the plain text.
    sample : Sample
        The sample.

    Raises
    ------
    ValueError
        The prompt has no tokens.
    """
    chat = sample.chat and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        text, question = _in_template(tokenizer, sample)
    else:
        said = [sample.system] if sample.system else []
        said += [f"{role.capitalize()}: {words}" for role, words in sample.earlier]
        text = "\n\n".join([*said, sample.prompt])
        question = f"\n\n{sample.question}\n" if sample.question else ""
    # A template writes its own beginning-of-sequence token.
    context = _ids(tokenizer, text, special=not chat)
    if not context:
        raise ValueError(f"sample {sample.id!r} of {sample.family!r} has an empty prompt")
    answer = sample.answers[0] if sample.answers else ""
    if answer and not chat and not (question or text)[-1:].isspace():
        answer = f" {answer}"
    return Encoded(context, _ids(tokenizer, question), _ids(tokenizer, answer)[:ANSWER_TOKENS], text)


def _in_template(tokenizer: Any, sample: Sample) -> tuple[str, str]:
    """The chat text up to the prompt's end, and from the question on."""
    content = f"{sample.prompt}{MARK}{sample.question}" if sample.question else sample.prompt
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    earlier = [{"role": role, "content": words} for role, words in sample.earlier]
    text = render(tokenizer, [*system, *earlier, {"role": "user", "content": content}], add_generation_prompt=True)
    context, _, question = text.partition(MARK)
    return context, f"\n\n{question}" if sample.question else ""


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the chat template; one without system role gets the system prompt in the user's message."""
    from jinja2 import TemplateError  # chat templates need it anyway

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError:  # templates that know no system prompt say so in this way
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        system, first, *rest = messages
        merged = {**first, "content": f"{system['content']}\n\n{first['content']}"}
        return str(tokenizer.apply_chat_template([merged, *rest], tokenize=False, **options))


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) if text else []
