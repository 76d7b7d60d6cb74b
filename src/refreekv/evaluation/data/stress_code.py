"""Generated source code that looks like a repository, with questions about it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from refreekv.evaluation.data import stress_text

CHARS_PER_TOKEN = 3.2
"""Of such code, roughly."""

_NOUNS = (
    *("invoice", "order", "ticket", "parcel", "sensor", "route", "ledger", "tenant", "shift", "voucher", "booking"),
    *("meter", "cargo", "permit", "recipe", "batch", "claim", "roster", "quota", "signal", "track", "fixture"),
)
_VERBS = (
    "compute",
    "merge",
    "resolve",
    "scale",
    "adjust",
    "estimate",
    "settle",
    "rank",
    "collect",
    "expand",
    "clip",
    "blend",
)
_TRAITS = (
    "weight",
    "total",
    "delay",
    "rate",
    "margin",
    "depth",
    "share",
    "index",
    "offset",
    "balance",
    "volume",
    "penalty",
)
_STATES = ("draft", "open", "held", "closed", "late", "urgent", "void")


@dataclass
class Module:
    """One generated file."""

    path: str
    text: str = ""
    constants: dict[str, int] = field(default_factory=dict)
    functions: dict[str, Callable[[int], int]] = field(default_factory=dict)


@dataclass
class Repository:
    """Generated files in order."""

    package: str
    modules: list[Module]

    @property
    def text(self) -> str:
        """All files, each under its path."""
        return "\n\n".join(f"# file: {module.path}\n{module.text}" for module in self.modules)


def repository(rng: random.Random, tokens: int) -> Repository:
    """A repository of about ``tokens`` tokens, at least two files."""
    package = stress_text.word(rng, 2)
    found = Repository(package, [])
    length = 0
    taken: set[str] = set()
    while length < tokens * CHARS_PER_TOKEN or len(found.modules) < 2:
        module = _module(rng, package, taken)
        found.modules.append(module)
        length += len(module.text) + len(module.path)
    return found


def _fresh(rng: random.Random, taken: set[str], make: Callable[[], str]) -> str:
    """A name not in use; a word is added to those that are."""
    name = make()
    while name in taken:
        name = f"{name}_{stress_text.word(rng, 1)}"
    taken.add(name)
    return name


def _module(rng: random.Random, package: str, taken: set[str]) -> Module:
    noun = rng.choice(_NOUNS)
    name = _fresh(rng, taken, lambda: f"{noun}_{rng.choice(_TRAITS)}s")
    module = Module(f"{package}/{name}.py")
    parts = [f'"""{noun.capitalize()}s: {rng.choice(stress_text.SUBJECTS)} and {rng.choice(stress_text.SUBJECTS)}."""']
    parts.append(rng.choice(("import logging\nfrom dataclasses import dataclass", "from dataclasses import dataclass")))
    for _ in range(rng.randint(1, 3)):
        constant = _fresh(
            rng, taken, lambda: f"{rng.choice(('MAX', 'MIN', 'BASE'))}_{noun}_{rng.choice(_TRAITS)}".upper()
        )
        module.constants[constant] = rng.randint(11, 9989)
    parts.append("\n".join(f"{constant} = {value}" for constant, value in module.constants.items()))
    pieces = [_class(rng, noun, taken)]
    for _ in range(rng.randint(2, 4)):
        function = _fresh(rng, taken, lambda: f"{rng.choice(_VERBS)}_{noun}_{rng.choice(_TRAITS)}")
        text, compute = _function(rng, function, noun)
        pieces.append(text)
        module.functions[function] = compute
    rng.shuffle(pieces)
    module.text = "\n\n\n".join(["\n\n".join(parts), *pieces]) + "\n"
    return module


def _function(rng: random.Random, name: str, noun: str) -> tuple[str, Callable[[int], int]]:
    """A function of one integer, as source and as what it computes."""
    argument = f"{noun}_{rng.choice(('count', 'units', 'level', 'size'))}"
    a, b, c = rng.randint(2, 9), rng.randint(3, 60), rng.randint(2, 12)
    trait = rng.choice(_TRAITS)
    head = f"def {name}({argument}: int) -> int:\n    "
    head += f'"""{rng.choice(("Return", "Work out", "Give"))} the {trait} for {rng.choice(stress_text.PLACES)}."""\n'
    shapes: list[tuple[str, Callable[[int], int]]] = [
        (
            f"    {trait} = {argument} * {a}\n    if {trait} > {b}:\n        {trait} -= {c}\n    return {trait}\n",
            lambda x: x * a - c if x * a > b else x * a,
        ),
        (f"    return {a} * {argument} + {b}\n", lambda x: a * x + b),
        (
            f"    {trait} = {b}\n    for step in range({argument}):\n        {trait} += step * {a}\n"
            f"    return {trait}\n",
            lambda x: b + a * sum(range(x)),
        ),
        (
            f"    # {stress_text.sentence(rng)}\n    base = {argument} % {c}\n    return base * {a} + {b}\n",
            lambda x: x % c * a + b,
        ),
        (
            f"    if {argument} < {c}:\n        return {b}\n    return {b} + ({argument} - {c}) * {a}\n",
            lambda x: b if x < c else b + (x - c) * a,
        ),
    ]
    body, compute = rng.choice(shapes)
    return (head + body).rstrip("\n"), compute


def _class(rng: random.Random, noun: str, taken: set[str]) -> str:
    name = _fresh(rng, taken, lambda: f"{noun.capitalize()}{rng.choice(_TRAITS).capitalize()}")
    fields = rng.sample(_TRAITS, rng.randint(2, 4))
    state = rng.choice(_STATES)
    about = stress_text.sentence(rng).replace('"', "'")
    lines = ["@dataclass", f"class {name}:", f'    """{about}"""', ""]
    lines += [f"    {trait}: {rng.choice(('int', 'float'))} = {rng.randint(0, 40)}" for trait in fields]
    lines += [f'    state: str = "{state}"', "", f"    def is_{state}(self) -> bool:"]
    lines += [f'        return self.state == "{state}" and self.{fields[0]} > {rng.randint(1, 30)}', ""]
    lines += [f"    def describe_{fields[1]}(self) -> str:"]
    lines += [f'        return f"{noun} {{self.{fields[1]}}} at {{self.{fields[0]}}}"']
    return "\n".join(lines)
