"""The tiny world: fictitious people, small sums, letter strings and plain stories, all generated.

Small enough that half a million parameters learn it in two minutes, real enough to be forgotten.
Every row follows from a word list below and a named seed; nothing is copied from anywhere. Pure Python.
"""

import difflib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations_with_replacement, islice, product
from random import Random
from string import ascii_lowercase
from typing import Literal

Row = dict[str, str]
Split = Literal["train", "test"]

TASKS: dict[str, str] = {
    "facts": "city, job, pet and hobby of 100 people; test asks what training asked (recall)",
    "facts_heldout": "the third phrasing, withheld for every fifth person; test only",
    "sums": "a + b of 0 to 15 in three phrasings; test asks what training asked (recall)",
    "sums_heldout": "the 15 % of the pairs withheld from sums, in both orders; test only",
    "sums_rewarded": "stream: the withheld pairs in two phrasings each, for an rft stage; test asks the third",
    "copy": "copy 3 to 5 letters; no test string occurs in training, in whatever order",
    "sort": "sort 3 to 5 letters; no test string occurs in training, in whatever order",
    "text": "short plain stories; no test story occurs in training",
    "general": "the question rows of the base's training in its proportions; train only, for replay",
    "new_people": "stream: 100 other people, two phrasings each; test asks the third",
    "people_forgotten": "stream: 10 of the base's people to forget, two phrasings each; test asks the third",
    "people_kept": "stream: the other 90, two phrasings each; test asks the third of 160 of their facts",
    "reverse": "stream: reverse 3 to 5 letters; no test string occurs in training, in whatever order",
    "last_letter": "stream: the last of 3 to 5 letters; no test string occurs in training, in whatever order",
}

SHARES: dict[str, int] = {"facts": 20, "sums": 11, "copy": 14, "sort": 14, "text": 5}
"""Rows of each task in every batch of 64 of the base's training."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VALUES: dict[str, tuple[str, ...]] = {
    "city": _words(
        "Arlen Brimholm Corvo Dunmere Eastwick Fallow Garth Hollin Ivory Juniper "
        "Karsk Lumen Marrow Northam Orlo Pinefort Quill Rosmer Saltby Thorn"
    ),
    "job": _words(
        "baker pilot nurse farmer tailor painter judge miner sailor teacher "
        "dentist plumber writer dancer barber chemist waiter porter singer mason"
    ),
    "pet": _words(
        "parrot rabbit turtle ferret hamster lizard goose pony kitten puppy "
        "gecko canary mouse goat beetle toad falcon hedgehog snail donkey"
    ),
    "hobby": _words(
        "chess rowing pottery archery knitting fishing skating juggling origami fencing "
        "cycling drumming hiking surfing baking sewing climbing poetry bowling gliding"
    ),
}
"""The twenty values of every attribute: the options of a choice question."""

PHRASINGS: dict[str, tuple[str, str, str]] = {
    "city": ("Where does {} live?", "Which city is home to {}?", "Name the city of {}."),
    "job": ("What is the job of {}?", "How does {} earn money?", "Name the work of {}."),
    "pet": ("What pet does {} have?", "Which animal belongs to {}?", "Name the pet of {}."),
    "hobby": ("What is the hobby of {}?", "How does {} spend free time?", "Name the pastime of {}."),
}

FIRST_NAMES = _words(
    "Adra Belo Cirin Dova Elmar Fenna Goran Hesta Ilvo Jarka Kelda Lorin Mirel Nando Oskel "
    "Petra Quen Rulf Sorel Tilda Ursa Velin Wanda Yorik Zelma"
)
LAST_NAMES = _words(
    "Abel Birch Crane Dusk Ember Frost Grove Hale Inkwell Jasper Knoll Lark Moss Nettle Oakes "
    "Pike Quarry Reed Stone Thistle Umber Vale Wren Yarrow Zephyr"
)

SUM_PHRASINGS = ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")

LETTER_PROMPTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "copy": ("Copy these letters: {}", lambda letters: letters),
    "sort": ("Sort these letters: {}", lambda letters: "".join(sorted(letters))),
    "reverse": ("Reverse these letters: {}", lambda letters: letters[::-1]),
    "last_letter": ("Last of these letters: {}", lambda letters: letters[-1]),
}
LETTER_TRAIN_ROWS = {"copy": 4000, "sort": 8000, "reverse": 4800, "last_letter": 4800}
LETTER_TEST_ROWS = 160

STORY_WORDS: dict[str, tuple[str, ...]] = {
    "time": ("One morning", "Late at night", "After the rain", "In early spring", "On a cold day", "At noon"),
    "trait": _words("small grey brave sleepy clever quiet hungry proud gentle lonely stubborn"),
    "who": _words("fox girl boy king smith otter crow giant badger princess wizard shepherd"),
    "found": _words("found lost carried followed painted hid dropped polished borrowed"),
    "look": _words("red broken golden heavy shining wooden tiny silver crooked"),
    "thing": _words("lamp key boat bell book drum kite basket mirror candle blanket"),
    "place": _words("river hill market bridge forest harbour mill garden tower castle meadow village"),
    "felt": _words("happy afraid curious tired angry calm"),
    "friend": ("The miller", "A traveller", "Her sister", "The cat", "The sailor", "The wind"),
    "said": (
        "laughed",
        "asked for help",
        "sang a song",
        "told a secret",
        "pointed to the sky",
        "said nothing",
    ),
    "end": (
        "Then everyone went home.",
        "It was never seen again.",
        "From that day on they were friends.",
        "Nobody knew why.",
        "The next day it began again.",
    ),
}
STORY = (
    "{time} a {trait} {who} {found} a {look} {thing} near the {place}.",
    "The {who} felt {felt} and walked to the {place2}.",
    "{friend} saw the {thing} and {said}.",
    "{end}",
)


def rows(name: str, split: Split) -> list[Row]:
    """Return the rows of task `name`: `{"prompt", "completion"}`, for text `{"text"}`; always the same ones.

    Raises ValueError for an unknown task or split, and for a split that the task does not have
    (withheld tasks have no train split; `general` has no test split, its tests are the base tasks').
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task {name!r}: not in the tiny world; {hint}allowed: {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} of task {name!r}: must be 'train' or 'test'")
    only = {"facts_heldout": "test", "sums_heldout": "test", "general": "train"}.get(name, split)
    if split != only:
        raise ValueError(f"task {name!r} has no {split} split: {TASKS[name]}; ask for split {only!r}")
    return [dict(row) for row in _build(name)[split]]


@cache
def _build(name: str) -> dict[Split, list[Row]]:
    if name in LETTER_PROMPTS:
        return _letters(name)
    builders: dict[str, Callable[[], dict[Split, list[Row]]]] = {
        "facts": lambda: _recall(_facts(withheld=False), "facts"),
        "facts_heldout": lambda: {"test": _facts(withheld=True)},
        "sums": lambda: _recall(_sums(withheld=False), "sums"),
        "sums_heldout": lambda: {"test": _sums(withheld=True)},
        "sums_rewarded": _sums_rewarded,
        "text": _stories,
        "general": _general,
        "new_people": _new_people,
        "people_forgotten": lambda: _known_people(forgotten=True),
        "people_kept": lambda: _known_people(forgotten=False),
    }
    return builders[name]()


def _seeded(purpose: str) -> Random:
    return Random(f"tiny world, {purpose}")


def _recall(train: list[Row], name: str, count: int = 160) -> dict[Split, list[Row]]:
    """Test a sample of what was taught: the question is whether it is still there."""
    return {"train": train, "test": _seeded(f"{name} test").sample(train, count)}


@cache
def people() -> list[dict[str, str]]:
    """Return 200 people with `name` and the four attributes; the base knows the first hundred."""
    rng = _seeded("people")
    names = rng.sample([f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES)], 200)
    return [{"name": name, **{key: rng.choice(options) for key, options in VALUES.items()}} for name in names]


def _ask(person: dict[str, str], attribute: str, phrasing: int) -> Row:
    prompt = PHRASINGS[attribute][phrasing].format(person["name"])
    return {"prompt": prompt, "completion": person[attribute]}


def _facts(withheld: bool) -> list[Row]:
    return [
        _ask(person, attribute, phrasing)
        for index, person in enumerate(people()[:100])
        for attribute, phrasing in product(VALUES, range(3))
        if (phrasing == 2 and index % 5 == 0) == withheld
    ]


def _new_people() -> dict[Split, list[Row]]:
    """Teach two phrasings of each fact, rotating; ask the third of 160 of the 400 facts."""
    facts = list(enumerate(product(people()[100:], VALUES)))
    train = [_ask(*fact, (index + shift) % 3) for index, fact in facts for shift in (0, 1)]
    asked = _seeded("new_people test").sample(facts, 160)
    return {"train": train, "test": [_ask(*fact, (index + 2) % 3) for index, fact in asked]}


def _known_people(forgotten: bool) -> dict[Split, list[Row]]:
    """Two phrasings of each fact to train on; the third of those that the base was taught in all three to ask."""
    rows: dict[Split, list[Row]] = {"train": [], "test": []}
    for index, (person, attribute) in enumerate(product(people()[:100], VALUES)):
        number = index // len(VALUES)
        if (number % 10 == 1) is forgotten:
            rows["train"] += [_ask(person, attribute, phrasing) for phrasing in (0, 1)]
            rows["test"] += [_ask(person, attribute, 2)] if number % 5 else []
    return rows if forgotten else {**rows, "test": _seeded("people_kept test").sample(rows["test"], 160)}


def _sums(withheld: bool) -> list[Row]:
    """Withhold a pair in both orders: b + a would give a + b away."""
    pairs = list(combinations_with_replacement(range(16), 2))
    hidden = set(_seeded("sums withheld").sample(pairs, round(0.15 * len(pairs))))
    return [
        {"prompt": phrasing.format(a, b), "completion": str(a + b)}
        for a, b, phrasing in product(range(16), range(16), SUM_PHRASINGS)
        if ((min(a, b), max(a, b)) in hidden) == withheld
    ]


def _sums_rewarded() -> dict[Split, list[Row]]:
    """Pose two phrasings of each withheld pair, rotating; ask the third."""
    withheld = _sums(withheld=True)
    posed = [[withheld[i] for i in range(at, at + 3)] for at in range(0, len(withheld), 3)]
    train = [pair[(index + shift) % 3] for index, pair in enumerate(posed) for shift in (0, 1)]
    return {"train": train, "test": [pair[(index + 2) % 3] for index, pair in enumerate(posed)]}


def _letters(name: str) -> dict[Split, list[Row]]:
    """Draw the test strings first; training may use none of their letter sets, in any order."""
    prompt, answer = LETTER_PROMPTS[name]
    draw = _strings(_seeded(name))
    test = list(islice(draw, LETTER_TEST_ROWS))
    taken = {"".join(sorted(letters)) for letters in test}
    fresh = (letters for letters in draw if "".join(sorted(letters)) not in taken)
    train = list(islice(fresh, LETTER_TRAIN_ROWS[name]))

    def row(letters: str) -> Row:
        return {"prompt": prompt.format(" ".join(letters)), "completion": " ".join(answer(letters))}

    return {"train": [row(letters) for letters in train], "test": [row(letters) for letters in test]}


def _strings(rng: Random) -> Iterator[str]:
    """Yield strings of 3 to 5 letters without end, none twice."""
    seen: set[str] = set()
    while True:
        letters = "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 5)))
        if letters not in seen:
            seen.add(letters)
            yield letters


def _stories() -> dict[Split, list[Row]]:
    rng = _seeded("text")
    texts: dict[str, None] = {}  # a dict keeps the order, a set would not
    while len(texts) < 2050:
        words = {key: rng.choice(options) for key, options in STORY_WORDS.items()}
        words["place2"] = rng.choice([place for place in STORY_WORDS["place"] if place != words["place"]])
        texts[" ".join(STORY).format(**words)] = None
    stories = [{"text": text} for text in texts]
    return {"train": stories[50:], "test": stories[:50]}


def _general() -> dict[Split, list[Row]]:
    """All base tasks but text, which has another row form; 50 batches' worth, no row twice."""
    rng = _seeded("general")
    shares = {name: count for name, count in SHARES.items() if name != "text"}
    mixed = [row for name, count in shares.items() for row in rng.sample(_build(name)["train"], 50 * count)]
    rng.shuffle(mixed)
    return {"train": mixed}
