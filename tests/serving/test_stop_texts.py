"""Stop texts in an answer that comes in pieces."""

import random

import pytest

from refreekv.serving.stopping import StopTexts


def shown(texts, pieces):
    stop = StopTexts(texts)
    out = "".join(stop.add(piece) for piece in pieces)
    return (out if stop.found else out + stop.rest()), stop.found


def wanted(texts, text):
    """What is in front of the first stop text, the plain way."""
    places = [text.find(stop) for stop in texts if stop in text]
    return (text[: min(places)], True) if places else (text, False)


@pytest.mark.parametrize("seed", range(200))
def test_pieces_give_what_the_whole_text_gives(seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("ab\n") for _ in range(draw.randint(0, 30)))
    texts = ["".join(draw.choice("ab\n") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
    pieces = []
    rest = text
    while rest:
        size = draw.randint(1, 5)
        pieces.append(rest[:size])
        rest = rest[size:]
    found = shown(texts, pieces)
    # A stop text that ends first ends the answer, also where another one began before it.
    ends = min((text.find(stop) + len(stop) for stop in texts if stop in text), default=None)
    assert found[1] == (ends is not None)
    if len(texts) <= 1:
        assert found == wanted(texts, text)
    elif ends is None:
        assert found[0] == text
    else:
        assert text.startswith(found[0])
        assert not any(stop in found[0] for stop in texts)


def test_what_may_become_a_stop_text_is_held_back():
    stop = StopTexts(["END"])
    assert stop.add("the E") == "the "
    assert stop.add("N") == ""
    assert stop.add("T") == "ENT"
    assert stop.add("END") == ""
    assert stop.found
    assert stop.add("more") == ""
