"""Records taken apart into exchanges, what dialogues are composed of, and exchanges put together to a record.

    record  ->  [Exchange, Exchange, ...]  ->  stages  ->  [Exchange, ...]  ->  record

An exchange holds what is meant, not how it is said in the end: the user's words are self-contained but for
the question which picture they are about, and that is a field of its own. Words that say it come last, when
the order of the dialogue is known.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, Part, Text, Turn
from umm_jax.data.synthesis.references import Reference, Told, phrases

# What may be moved about in a dialogue: answered from the words and at most one picture.
MOVABLE = ("draw", "edit", "ask", "describe", "locate", "segment", "chat", "story")
# Words that lean on what was said just before.
_LEANING = {
    "it",
    "that",
    "this",
    "them",
    "those",
    "these",
    "same",
    "again",
    "undo",
    "previous",
    "last",
    "he",
    "she",
}


@dataclass(frozen=True)
class Picture:
    """A picture of a dialogue.

    Attributes:
        key: tells pictures apart; the hash of the encoded bytes.
        facts: phrases that words of the data say of it, a request or a description; None where nothing does.
        maybe: phrases that were true of what it was made from.
        words: the request or description as it stands; "" where there is none.
    """

    key: str
    image: ImageData
    facts: frozenset[str] | None = None
    maybe: frozenset[str] = frozenset()
    words: str = ""


@dataclass(frozen=True)
class Exchange:
    """What a user asks and what is answered.

    Attributes:
        op: of MOVABLE, or another.
        said: the user's words.
        answer: texts, pictures, and regions, whose `of` is a picture's key.
        brings: pictures the user shows with the words.
        about: the picture asked about or changed.
        reference: how the user says which picture is meant; None where the last one is.
        needs: further pictures that one must have seen to answer.
        role: "source", "dependent", "negative", "distractor", "reply" or "" in the plan of a stage.
        source: id of the record it comes from.
        name: what the user calls the picture from now on.
    """

    op: str
    said: str
    answer: tuple[str | Picture | Box | Mask, ...]
    brings: tuple[Picture, ...] = ()
    about: Picture | None = None
    needs: tuple[Picture, ...] = ()
    reference: Reference | None = None
    role: str = ""
    source: str = ""
    name: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that it shows, in order."""
        return (*self.brings, *(part for part in self.answer if isinstance(part, Picture)))

    def told(self, turn: int, words: str | None = None) -> Told:
        """As a reader sees it at a turn, in these words or its own."""
        answers = tuple(part.key for part in self.answer if isinstance(part, Picture))
        about = None if self.about is None else self.about.key
        brings = tuple(picture.key for picture in self.brings)
        return Told(turn, self.said if words is None else words, brings, answers, about, self.name)

    @property
    def stands_alone(self) -> bool:
        """Whether its words need nothing said before, but for the picture."""
        # Beside a picture that is shown with the words, "it" and "this" are that picture.
        leans = not self.brings and _LEANING & set(re.findall(r"[a-z]+", self.said.lower()))
        return self.op in MOVABLE and not leans


def chain_of(record: Conversation) -> list[Exchange]:
    """The exchanges of a record; empty where it is no dialogue of one user turn and one answer after another.

    An exchange is about the last picture shown before its answer. What is known of a picture: of a drawn one
    the words it was asked for by, of a described one the description.
    """
    turns = [turn for turn in record.turns if turn.role != "system"]
    if len(turns) % 2 or any(t.role != ("user", "assistant")[k % 2] for k, t in enumerate(turns)):
        return []
    known: dict[str, Picture] = {}
    last: Picture | None = None
    found = []
    for asked, answered in zip(turns[::2], turns[1::2]):
        brings = []
        for part in asked.parts:
            if isinstance(part, Image):
                key = record.images[part.ref].sha256
                brings.append(known.setdefault(key, Picture(key, record.images[part.ref])))
        about = brings[-1] if brings else last
        op = _op(asked, answered)
        said = asked.text
        parts: list[str | Picture | Box | Mask] = []
        for part in answered.parts:
            match part:
                case Text(text):
                    parts.append(text)
                case Image(ref):
                    key = record.images[ref].sha256
                    known.setdefault(key, _made(op, said, about, key, record.images[ref]))
                    parts.append(known[key])
                case Box() | Mask():
                    parts.append(replace(part, of=record.images[part.of].sha256))
                case _:
                    return []
        if op == "describe" and about is not None and about.facts is None:
            words = " ".join(part for part in parts if isinstance(part, str))
            about = known[about.key] = replace(about, facts=phrases(words), words=words)
            brings = [known[picture.key] for picture in brings]
        found.append(
            Exchange(
                op,
                said,
                tuple(parts),
                tuple(brings),
                None if op in ("draw", "chat") else about,
                source=record.id,
            )
        )
        shown = found[-1].pictures
        last = shown[-1] if shown else last
    return found


def _op(asked: Turn, answered: Turn) -> str:
    """The operation, where the record does not say: by whether pictures are brought and answered."""
    if answered.op:
        return "chat" if answered.op == "smalltalk" else answered.op
    shows = any(isinstance(part, Image) for part in answered.parts)
    brings = any(isinstance(part, Image) for part in asked.parts)
    return "edit" if shows and brings else "draw" if shows else "ask" if brings else "chat"


def _made(op: str, said: str, about: Picture | None, key: str, image: ImageData) -> Picture:
    if op == "draw":
        return Picture(key, image, phrases(said), words=said)
    # An edit may have removed what was there: what was true before is only possible now.
    before = (about.facts or frozenset()) | about.maybe if about else frozenset()
    return Picture(key, image, None, before | phrases(said))


def pooled(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Exchanges of several records with all that any of them knows of a picture.

    What is known of an edited picture is possible of the picture that was made of it.
    """
    found: dict[str, Picture] = {}

    def learn(picture: Picture, further: frozenset[str] = frozenset()) -> Picture:
        old = found.get(picture.key, picture)
        facts = old.facts if picture.facts is None else picture.facts
        merged = replace(old, facts=facts, maybe=old.maybe | picture.maybe | further)
        found[picture.key] = replace(merged, words=old.words or picture.words)
        return found[picture.key]

    for exchange in exchanges:
        about = None if exchange.about is None else learn(exchange.about)
        for picture in exchange.brings:
            learn(picture)
        possible = frozenset() if about is None else (about.facts or frozenset()) | about.maybe
        for part in exchange.answer:
            if isinstance(part, Picture):
                learn(part, possible if exchange.op == "edit" and part.facts is None else frozenset())
    return [_again(exchange, found) for exchange in exchanges]


def _again(exchange: Exchange, found: Mapping[str, Picture]) -> Exchange:
    return replace(
        exchange,
        answer=tuple(found[p.key] if isinstance(p, Picture) else p for p in exchange.answer),
        brings=tuple(found[p.key] for p in exchange.brings),
        about=None if exchange.about is None else found[exchange.about.key],
        needs=tuple(found[p.key] for p in exchange.needs),
    )


# --- and together again -----------------------------------------------------------------------------------


def compose(
    name: str, exchanges: Sequence[Exchange], words: Sequence[str], facts: Mapping[str, Any]
) -> Conversation:
    """A record of exchanges.

    Args:
        words: the user's words in each of them, with the reference in them.
        facts: source, license, split, provenance and meta of the record.
    """
    refs: dict[str, str] = {}
    images: dict[str, ImageData] = {}
    shown_at: dict[str, int] = {}
    turns: list[Turn] = []

    def show(picture: Picture, turn: int) -> Image:
        ref = refs.setdefault(picture.key, f"i{len(refs)}")
        images[ref] = picture.image
        shown_at.setdefault(picture.key, turn)
        return Image(ref)

    for exchange, said in zip(exchanges, words, strict=True):
        t = len(turns)
        before = {p.key for p in (*exchange.needs, *exchange.pictures) if p not in exchange.brings}
        needs = {shown_at[key] for key in before & set(shown_at)}
        if (
            exchange.about is not None
            and exchange.about.key in shown_at
            and exchange.about not in exchange.brings
        ):
            needs.add(shown_at[exchange.about.key])
        user: list[Part] = [show(picture, t) for picture in exchange.brings]
        user += [Text(said)] if said else []
        answer: list[Part] = []
        for part in exchange.answer:
            match part:
                case str():
                    answer.append(Text(part))
                case Picture():
                    answer.append(show(part, t + 1))
                case _:
                    answer.append(replace(part, of=refs[part.of]))
        meta = {"from": exchange.source, "role": exchange.role, **exchange.meta}
        if exchange.about is not None:
            meta["about"] = refs[exchange.about.key]
        if exchange.reference is not None:
            meta["reference"] = exchange.reference.plain()
        if exchange.name:
            meta["name"] = exchange.name
        meta["query"] = exchange.said
        turns.append(Turn("user", tuple(user), False, tuple(sorted(needs)), exchange.op, meta))
        turns.append(Turn("assistant", tuple(answer), True, tuple(sorted({*needs, t})), exchange.op))
    known = {p.key: p for exchange in exchanges for p in exchange.pictures}
    said_of = {
        refs[key]: {"facts": None if p.facts is None else sorted(p.facts), "maybe": sorted(p.maybe)}
        for key, p in known.items()
    }
    record = Conversation(
        name, tuple(turns), images, **{**facts, "meta": {**facts.get("meta", {}), "pictures": said_of}}
    )
    record.validate()
    return record
