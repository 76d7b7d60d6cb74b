"""Generated English for the stress families: many sentence shapes over a wide vocabulary.

Repeating one filler sentence, as older needle tests do, makes every key alike and any
policy look good or bad by accident. The text here is meaningless as a whole, yet no two
paragraphs are the same.
"""

import random
import re
from collections.abc import Callable, Sequence

CHARS_PER_TOKEN = 4.3
"""Of this English, roughly, for the tokenizers in use; sizes are asked for in tokens."""


def _listed(text: str, separator: str = ",") -> list[str]:
    return text.split(separator)


PEOPLE = _listed(
    "Amara Nestor Ilse Tobias Marguerite Kwame Yuki Leandro Priya Oskar Fatima Henrik Noor Delphine Rafael Ingrid "
    "Samuel Zofia Mateo Beatrix Anders Laila Cormac Juniper Viktor Esme Dragan Hana Lucien Petra Emeka Saskia",
    " ",
)
PLACES = _listed(
    "the harbour office,the north greenhouse,Platform Nine,the old observatory,a barn outside Veldhoven,the archive "
    "cellar,the mill by the weir,the night market,Pier Four,the quarry road,the botanical library,a workshop in "
    "Tarnów,the signal tower,the tram depot,the lower orchard,the customs shed,the glassworks,the chapel hill,the "
    "ferry landing,the salt warehouse,the map room,the eastern reservoir,the printing hall,a bakery on Linden Street"
)
THINGS = _listed(
    "ledger,copper valve,wooden crate,barometer,bolt of linen,telescope,jar of resin,bicycle frame,clay tablet,"
    "reel of cable,violin case,sack of barley,ship model,brass key,radio set,pocket atlas,roof tile,lantern,"
    "pressure gauge,letter press,seed drawer,anvil,coil of rope,camera lens,tide table,loom shuttle,ice box,bell"
)
ADJECTIVES = _listed(
    "narrow,patient,rusted,bright,unmarked,borrowed,heavy,damp,careful,foreign,cracked,silent,early,polished,crooked,"
    "spare,wide,sealed,faded,restless,hollow,modest,brittle,tall,sudden,plain,stubborn,northern,warm,forgotten"
)
VERBS = _listed(
    "repaired,counted,misplaced,sketched,carried,traded,cleaned,photographed,weighed,labelled,buried,borrowed,"
    "measured,painted,returned,wrapped,inspected,auctioned,dismantled,described,hid,catalogued,exchanged,tested"
)
SUBJECTS = _listed(
    "river tides,local elections,copper prices,beekeeping,railway timetables,medieval glazing,winter crops,wave "
    "energy,shorthand,street lighting,mountain weather,paper making,bridge inspection,bird migration,choir practice,"
    "harbour dredging,cheese ageing,clock repair,soil acidity,radio propagation,sail cloth,tax law,grain storage"
)
REASONS = _listed(
    "the road had flooded,nobody had signed the form,the price had doubled,the train was late again,a storm had been "
    "forecast,the roof leaked,the committee disagreed,the keys were missing,visitors were expected,the old one had "
    "cracked,the season was over,the engine would not start,the neighbours complained,the grant ran out"
)
MONTHS = _listed("January February March April May June July August September October November December", " ")
WEEKDAYS = _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday", " ")

_ONSETS = _listed("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w y z", " ")
_VOWELS = _listed("a e i o u ai ea io ou", " ")
_CODAS = ["", "", "l", "n", "r", "s", "m", "nd", "rk", "st", "x", "th"]

_SENTENCES = (
    "In {month}, {person} {verb} the {adj} {thing} near {place}.",
    "{person} had always thought that {subject} mattered less than {subject2}, until {reason}.",
    "Because {reason}, the {thing} was moved from {place} to {place2}.",
    "Nobody at {place} could say who {verb} the {thing}, though {person} suspected {person2}.",
    "A {adj} {thing} and {n} {things2} stood by the door of {place}.",
    '"It is the {adj} one," said {person}, "the one {person2} {verb} last {weekday}."',
    "For {n} years the lectures on {subject} were held at {place}, every {weekday} at {hour}.",
    "The report about {subject} ran to {n} pages and mentioned the {thing} only once.",
    "When {person} asked about {subject}, {person2} answered with a story about a {thing}.",
    "{place_cap} smelled of {adj} wood, and {reason}.",
    "Of the {n} visitors who came in {month}, most wanted to hear about {subject}.",
    "{person} kept notes on {subject} in one drawer and notes on {subject2} in another.",
    "Whoever {verb} the {thing} must have known {place} well.",
    "By {weekday} the {things2} had been {verb}, {verb2} and finally forgotten.",
    "Was it really {person} who {verb} the {thing}, or had {reason}?",
    "The distance from {place} to {place2} is {n} minutes on foot, longer when {reason}.",
    "{person} and {person2} disagreed about {subject}; the {adj} {thing} settled nothing.",
    "A letter dated {day} {month} describes {place} as {adj} and {adj2}.",
    "Since {reason}, {person} spent the {weekday} reading about {subject}.",
    "There is a {adj} path behind {place} where {person} once {verb} a {thing}.",
    "Prices for a {thing} rose by {n} percent in {month}, and {person} blamed {subject}.",
    "Later, {person2} would claim that {subject} had never interested {person} at all.",
    "The {thing} at {place} is {adj}, {adj2} and about {n} centimetres wide.",
    "{n} crates arrived, {person} signed for them, and {reason}.",
    "In the dialect of {coined}, a {thing} is called a {coined2}.",
    "{person} {coined_cap}, born in {coined}, {verb} {things2} for a living.",
    "The {coined_cap} report on {subject} was {adj}, said {person}, but {person2} had not read it.",
    "From {coined} to {coined_cap} the road follows the river, and {place} lies halfway.",
    "Above the entrance of {place} hangs a {adj} {thing} from {coined}.",
)


def sentence(rng: random.Random) -> str:
    """One sentence of filler."""
    person, person2 = (_named(rng, name) for name in rng.sample(PEOPLE, 2))
    place, place2 = rng.sample(PLACES, 2)
    thing, thing2 = rng.sample(THINGS, 2)
    adj, adj2 = rng.sample(ADJECTIVES, 2)
    verb, verb2 = rng.sample(VERBS, 2)
    subject, subject2 = rng.sample(SUBJECTS, 2)
    # Coined names keep the vocabulary open, as names do in real text.
    coined, coined2 = (word(rng, rng.randint(2, 3)).capitalize() for _ in range(2))
    text = rng.choice(_SENTENCES).format(
        coined=coined,
        coined2=coined2.lower(),
        coined_cap=coined2,
        person=person,
        person2=person2,
        place=place,
        place2=place2,
        place_cap=place[0].upper() + place[1:],
        thing=thing,
        things2=plural(thing2),
        adj=adj,
        adj2=adj2,
        verb=verb,
        verb2=verb2,
        subject=subject,
        subject2=subject2,
        reason=rng.choice(REASONS),
        month=rng.choice(MONTHS),
        weekday=rng.choice(WEEKDAYS),
        hour=f"{rng.randint(7, 21)}:{rng.choice(('00', '15', '30', '45'))}",
        day=rng.randint(1, 28),
        n=rng.randint(3, 96),
    )
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def _named(rng: random.Random, name: str) -> str:
    """The name, with a family name now and then."""
    return f"{name} {word(rng, rng.randint(1, 3)).capitalize()}" if rng.random() < 0.4 else name


def plural(noun: str) -> str:
    """The plural of one of `THINGS`."""
    head, of, rest = noun.partition(" of ")
    return head + ("es" if head.endswith(("s", "x", "ss")) else "s") + of + rest


def sentences(rng: random.Random, tokens: float) -> list[str]:
    """Sentences of filler, ``tokens`` long in all, roughly."""
    result: list[str] = []
    length = 0
    while length < tokens * CHARS_PER_TOKEN:
        result.append(sentence(rng))
        length += len(result[-1]) + 1
    return result


def paragraphs(rng: random.Random, parts: Sequence[str]) -> str:
    """Sentences joined to paragraphs of three to seven."""
    lines: list[str] = []
    start = 0
    while start < len(parts):
        stop = start + rng.randint(3, 7)
        lines.append(" ".join(parts[start:stop]))
        start = stop
    return "\n\n".join(lines)


def hide(rng: random.Random, facts: Sequence[str], tokens: float) -> str:
    """Facts in the order given, spread evenly at random over filler; ``tokens`` long in all, roughly."""
    own = sum(len(fact) for fact in facts) / CHARS_PER_TOKEN
    filler = sentences(rng, max(tokens - own, 0))
    places = sorted(rng.randint(0, len(filler)) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        filler.insert(place, fact)
    return paragraphs(rng, filler)


def word(rng: random.Random, syllables: int = 2) -> str:
    """A made-up word."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """``count`` different results of ``make``; ValueError if it has not as many to give."""
    found: dict[str, None] = {}
    for _ in range(50 * count):
        found[make()] = None
        if len(found) == count:
            break
    else:
        raise ValueError(f"no {count} different ones can be made, only about {len(found)}")
    return list(found)


def code(rng: random.Random) -> str:
    """A random identifier, in one of several shapes."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    return rng.choice(
        (
            lambda: "".join(rng.choice(letters) for _ in range(3)) + f"-{rng.randint(1000, 9999)}",
            lambda: f"{rng.randint(100000, 9999999)}",
            lambda: f"{word(rng)}-{word(rng)}",
            lambda: f"{rng.getrandbits(32):08x}-{rng.getrandbits(16):04x}",
        )
    )()
