"""Stop texts: an answer ends before the first of them, also where it comes in pieces."""

from collections.abc import Sequence


class StopTexts:
    """Lets the text of an answer through up to the first stop text.

    The beginning of what may become a stop text is held back until it is clear whether it does.

    Parameters
    ----------
    texts : sequence of str
        None of them empty.

    Attributes
    ----------
    found : bool
        Whether one has come.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far can be shown and was not yet."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._texts) if place >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        return self._let_go(self._begun())

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        return self._let_go(0)

    def _begun(self) -> int:
        """Characters at the end that a stop text begins with."""
        longest = max((len(stop) for stop in self._texts), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._texts):
                return length
        return 0

    def _let_go(self, keep: int) -> str:
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown
