"""Tokens to text, one token after the other."""

from typing import Any

LONGEST_CHARACTER = 8
"""Tokens after which a character that does not come together is shown as it is."""


class Detokenizer:
    """The text that each new token adds.

    A token's text depends on its neighbours: some tokenizers write a space between words that
    neither token has by itself, and a character may be split over several tokens. So a few
    tokens are decoded together with those before them, and what is new is the difference.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Decodes the tokens.
    skip_special_tokens : bool
        Whether special tokens have no text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # the tokens of the last text given out
        self._open: list[int] = []  # tokens that have no text yet

    def add(self, token: int) -> str:
        """The text that is complete now; empty within a character that is split over tokens."""
        self._open.append(token)
        before = self._decode(self._context)
        text = self._decode(self._context + self._open)
        if text.endswith("\ufffd") and len(self._open) < LONGEST_CHARACTER:
            return ""
        self._context, self._open = self._open, []
        # Where decoding the two together changes the first part, only the second can be shown.
        return text[len(before) :] if text.startswith(before) else self._decode(self._context)

    def rest(self) -> str:
        """What is left of a character that never came together."""
        left, self._open = self._open, []
        before = self._decode(self._context)
        return self._decode(self._context + left)[len(before) :] if left else ""

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
            if tokens
            else ""
        )


def token_texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token, special tokens included; all together they are the whole text.

    Of the tokens that share a character the last has it, the others have none.
    """
    added = Detokenizer(tokenizer)
    texts = [added.add(token) for token in tokens]
    if texts:
        texts[-1] += added.rest()
    return texts
