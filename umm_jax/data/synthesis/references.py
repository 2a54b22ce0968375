"""Ways to say which picture is meant: as words, read back from words, and resolved in a history.

A :class:`Reference` is a meaning; :func:`spell` gives it words, :func:`read` finds it again in words that
stand with a query, and :func:`resolve` says which pictures of a history it fits. The checks of a dialogue are
made from its words by the last two, so they do not trust whoever wrote them.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBERED = ("order", "drawn", "sent")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

_STOP = frozenset(
    (
        "and are been being but can could did does for from had has have how into its just make not off one "
        "onto our out over please shall should some such than that the their them then there these they this "
        "those too plus much under very was were what when where which while who why will with would you "
        "your add put draw picture image photo show paint give turn change remove replace now also left "
        "right top bottom background"
    ).split()
)


@dataclass(frozen=True)
class Reference:
    """Which picture is meant.

    | kind | value | the picture |
    |---|---|---|
    | order | 2 | shown as the second of all |
    | drawn | 2 | that the assistant made second |
    | sent | 1 | that the user sent first |
    | content | "red circle" | of which that is said |
    | name | "Rosa" | that was given that name |
    | other | | that is not the last, of two |
    | before | "snow" | as it was before the change that was asked for with this word |
    | topic | "lisbon" | the first shown after the talk about it |
    """

    kind: str
    value: int | str = ""

    def plain(self) -> list:
        return [self.kind, self.value]


def content_words(text: str) -> list[str]:
    """Its words that say something, in order."""
    return [w for w in re.findall(r"[^\W\d_]{3,}", text.lower()) if w not in _STOP]


def phrases(text: str) -> frozenset[str]:
    """Words and pairs of neighbouring words that a picture may be known by."""
    found: set[str] = set()
    words = re.findall(r"[^\W\d_]+", text.lower())
    for a, b in zip(words, [*words[1:], ""]):
        if len(a) >= 3 and a not in _STOP:
            found.add(a)
            if len(b) >= 3 and b not in _STOP:
                found.add(f"{a} {b}")
    return frozenset(found)


# --- words ------------------------------------------------------------------------------------------------

# Each pattern is written to and read from. {n} is an ordinal, {w} words, {x} a name.
_PHRASES: dict[str, tuple[str, ...]] = {
    "order": ("the {n} picture", "the {n} image", "the {n} picture here"),
    "drawn": ("the {n} picture you drew", "the {n} one you made", "the {n} picture that you made"),
    "sent": ("the {n} picture i sent", "the {n} photo i sent", "the {n} picture that i gave you"),
    "content": ("the picture with {w}", "the one with {w}", "the image with {w}"),
    "name": ("{x}", "the picture we called {x}"),
    "other": ("the other picture", "the picture that is not the last one"),
    "before": ("the version before i asked for {w}", "how it was before {w}"),
    "topic": ("the picture from when we talked about {w}", "what you showed after we talked about {w}"),
}
# How a query and a reference stand together, by what is asked; {q} is the query.
_FRAMES: dict[str, tuple[str, ...]] = {
    "": ("in {r}, {q}", "about {r}: {q}", "{q} (i mean {r})", "in {r} {q}"),
    "edit": ("go back to {r} and {q}", "take {r} and {q}", "with {r}: {q}", "{q} (i mean {r})"),
    "recall": ("go back to {r}", "show me {r} again", "please show {r} once more", "{r} again please"),
}
NAMES = ("Rosa", "Bruno", "Mika", "Lupe", "Otto", "Nora", "Ivo", "Tess", "Juno", "Remy")

_VALUE = {"n": f"({'|'.join(ORDINALS)})", "w": r"([^\W\d_]+(?: [^\W\d_]+)?)", "x": f"({'|'.join(NAMES)})"}


def _pattern(phrase: str) -> str:
    return re.sub(
        r"\{([nwx])\}", lambda m: _VALUE[m[1]], re.escape(phrase).replace(r"\{", "{").replace(r"\}", "}")
    )


_READ = [
    (kind, re.compile(f"{_pattern(phrase)}", re.IGNORECASE))
    for kind, several in _PHRASES.items()
    for phrase in several
]


def variants(reference: Reference) -> list[str]:
    """Every phrase for it."""
    n = ORDINALS[reference.value - 1] if isinstance(reference.value, int) else ""
    return [
        phrase.replace("{n}", n).replace("{w}", str(reference.value)).replace("{x}", str(reference.value))
        for phrase in _PHRASES[reference.kind]
    ]


def spell(reference: Reference, query: str, op: str, rng: random.Random) -> str:
    """The query with words for the reference, chosen by `rng`; a recall has no query of its own."""
    frame = rng.choice(_FRAMES.get(op, _FRAMES[""]))
    return frame.replace("{r}", rng.choice(variants(reference))).replace("{q}", query)


def read(text: str, query: str, op: str) -> Reference | None:
    """The reference that stands in `text` beside the words of `query`; None where there is none."""
    for frame in _FRAMES.get(op, _FRAMES[""]):
        before, after = frame.replace("{q}", query).split("{r}")
        if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
            continue
        phrase = text[len(before) : len(text) - len(after)]
        for kind, pattern in _READ:
            if match := pattern.fullmatch(phrase):
                (value,) = match.groups() or ("",)
                return Reference(kind, ORDINALS.index(value.lower()) + 1 if kind in NUMBERED else value)
    return None


# --- histories ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A picture where a history shows it first.

    `origin` is "sent" or "drawn"; `words` are the user's that led to it; `parent` is what it was made from.
    """

    key: str
    turn: int
    origin: str
    words: str
    parent: str | None
    facts: frozenset[str] | None
    maybe: frozenset[str]


@dataclass(frozen=True)
class Told:
    """One exchange as a reader sees it: keys of the pictures it shows, and the user's words."""

    turn: int
    words: str
    brings: tuple[str, ...]
    answers: tuple[str, ...]
    about: str | None = None
    name: str = ""


@dataclass(frozen=True)
class History:
    """What a reader of some exchanges knows.

    Attributes:
        pictures: in the order in which they are first shown.
        last: key of the last one shown.
        names: what pictures are called. talks: (turn, words) of the exchanges without a picture.
    """

    pictures: Sequence[Seen]
    last: str | None
    names: Mapping[str, str]
    talks: Sequence[tuple[int, str]]


Facts = Mapping[str, tuple[frozenset[str] | None, frozenset[str]]]  # by key: what is said of it, what may be


def history(told: Sequence[Told], facts: Facts) -> History:
    """The history that these exchanges, and no others, leave."""
    pictures: dict[str, Seen] = {}
    last, names, talks = None, {}, []
    for exchange in told:
        for origin, keys in (("sent", exchange.brings), ("drawn", exchange.answers)):
            for key in keys:
                parent = exchange.about if origin == "drawn" and exchange.about != key else None
                seen = Seen(key, exchange.turn, origin, exchange.words, parent, *facts[key])
                pictures.setdefault(key, seen)
                last = key
        if exchange.name and last is not None:
            names[exchange.name] = last
        if not (exchange.brings or exchange.answers or exchange.about):
            talks.append((exchange.turn, exchange.words))
    return History(tuple(pictures.values()), last, names, tuple(talks))


def resolve(reference: Reference, history: History) -> list[str]:
    """The keys of the pictures it may mean: one where it is clear, none or several where it is not."""
    pictures, value = history.pictures, reference.value
    match reference.kind:
        case "order" | "drawn" | "sent":
            of = [p for p in pictures if reference.kind in ("order", p.origin)]
            return [of[value - 1].key] if 0 < value <= len(of) else []
        case "content":
            return [p.key for p in pictures if _may_show(p, value)]
        case "name":
            return [history.names[value]] if value in history.names else []
        case "other":
            return [p.key for p in pictures if p.key != history.last] if len(pictures) == 2 else []
        case "before":
            changed = [p for p in pictures if p.parent is not None and value in content_words(p.words)]
            there = {p.key for p in pictures}
            return [p.parent for p in changed if p.parent in there] if len(changed) == 1 else []
        case "topic":
            talks = [turn for turn, words in history.talks if value in content_words(words)]
            after = [p.key for p in pictures if talks and p.turn > talks[0]]
            return after[:1] if len(talks) == 1 else []
    raise ValueError(f"unknown reference {reference}")


def _may_show(picture: Seen, value: str) -> bool:
    # A picture nobody said anything about might show it too.
    nothing_said = picture.facts is None and not picture.maybe
    return nothing_said or value in picture.maybe or value in (picture.facts or ())


def possible(target: str, history: History) -> list[Reference]:
    """All references by which the history gives this picture and no other."""
    found = []
    order = [p.key for p in history.pictures]
    kinds: list[tuple[str, Any]] = [("order", order.index(target) + 1)]
    seen = history.pictures[order.index(target)]
    same = [p.key for p in history.pictures if p.origin == seen.origin]
    kinds.append((seen.origin, same.index(target) + 1))
    kinds += [("content", phrase) for phrase in sorted(seen.facts or ())]
    kinds += [("name", name) for name, key in history.names.items() if key == target]
    kinds.append(("other", ""))
    for p in history.pictures:
        if p.parent == target:
            kinds += [("before", word) for word in sorted(set(content_words(p.words)))]
    for turn, words in history.talks:
        if turn < seen.turn:
            kinds += [("topic", word) for word in sorted(set(content_words(words)))]
    for kind, value in kinds:
        if kind in NUMBERED and value > len(ORDINALS):
            continue
        reference = Reference(kind, value)
        if resolve(reference, history) == [target]:
            found.append(reference)
    return found
