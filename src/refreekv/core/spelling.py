"""How things with parameters are written: ``name:key=value,key=value``; near names for what is misspelt.

Policies, number formats, task families and their lists all go through here.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

Item = tuple[str, str | None]
"""A parameter's name and its text; None for a word that stands alone."""


def parts(spec: str) -> tuple[str, list[Item]]:
    """Name and parameters of a specification, in the order written.

    Examples
    --------
    >>> parts("qasper: after, tokens = 500")
    ('qasper', [('after', None), ('tokens', '500')])
    """
    name, _, rest = spec.partition(":")
    items: list[Item] = []
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        items.append((key, value if equals else None))
    return name.strip(), items


def spell(name: str, parameters: Mapping[str, Any], words: Iterable[str] = ()) -> str:
    """The specification that `parts` reads: words that stand alone first, then parameters.

    Examples
    --------
    >>> spell("niah", {"tokens": 500})
    'niah:tokens=500'
    """
    items = [*words, *(f"{key}={value}" for key, value in parameters.items())]
    return f"{name}:{','.join(items)}" if items else name


def listed(texts: Iterable[str], words: Iterable[str] = ()) -> list[str]:
    """Specifications out of comma-separated lists, in which their parameters have commas too; each once.

    Parameters
    ----------
    texts : iterable of str
        The lists.
    words : iterable of str
        What belongs to the specification before it though it has no ``=``.

    Examples
    --------
    >>> listed(["gsm8k,niah:tokens=500,depths=3,qasper:after"], ["after"])
    ['gsm8k', 'niah:tokens=500,depths=3', 'qasper:after']
    """
    alone, found = set(words), list[str]()
    for part in filter(None, (part.strip() for text in texts for part in text.split(","))):
        if found and (part in alone or ("=" in part and ":" not in part)):
            found[-1] += ("," if ":" in found[-1] else ":") + part
        else:
            found.append(part)
    return list(dict.fromkeys(found))


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'snapkv'?`` for the nearest of the known words, or nothing; the end of an error's sentence."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
